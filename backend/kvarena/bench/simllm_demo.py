"""`kvarena simllm demo`: reuse between similar tasks, shown in a terminal on questions on chunks.

Imported when the command line starts: everything heavy is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from kvarena.bench.console import console_for, explained, new_table, progress

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from kvarena.bench.quality.questions import EvalQuestion, QuestionSet
    from kvarena.bench.simllm import SharedModel, StreamSettings


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Reuse between similar tasks (Sim-LLM).")

NUM_TASKS = 12
UNRELATED = {"unrelated": "What is machine learning?", "its twin": "Explain machine learning."}


class DemoMode(StrEnum):
    BASIC = "basic"
    SIMILARITY = "similarity"
    BENCHMARK = "benchmark"


@app.callback()
def simllm() -> None:
    """Reuse between similar tasks (Sim-LLM)."""


@app.command()
def demo(
    mode: Annotated[
        DemoMode,
        typer.Option(
            "--mode",
            "--demo_mode",
            "--demo-mode",
            help="basic: single prompts; similarity: pairs of prompts; benchmark: a short stream of tasks.",
        ),
    ] = DemoMode.BASIC,
    model_path: Annotated[
        str | None,
        typer.Option(
            "--model_path",
            "--model-path",
            help="A Llama model: a local folder or a Hugging Face model name. [default: the town model]",
        ),
    ] = None,
    max_cache_size: Annotated[
        int,
        typer.Option("--max_cache_size", "--max-cache-size", min=1, help="Tasks that are kept; similarity keeps none."),
    ] = 100,
    similarity_threshold: Annotated[
        float,
        typer.Option("--similarity_threshold", "--similarity-threshold", min=-1, max=1, help="A cosine similarity."),
    ] = 0.8,
    num_hyperplanes: Annotated[
        int,
        typer.Option(
            "--num_hyperplanes", "--num-hyperplanes", min=1, max=64, help="Bits of the hash by which tasks are found."
        ),
    ] = 16,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", "--max-new-tokens", min=1, help="Tokens of each answer.")
    ] = 8,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; the CPU, with a warning, where there is no such device.")
    ] = "auto",
) -> None:
    """Show on the shipped questions what a similar earlier task saves and costs."""
    from transformers.utils import logging

    from kvarena.bench.quality.questions import load_questions
    from kvarena.bench.simllm import Bench, SharedModel, StreamSettings, show_quality, show_speed, variants
    from kvarena.contenders.simllm.params import MODES
    from kvarena.documents import QUESTIONS_NAME
    from kvarena.model import find_model

    console = console_for(False)
    logging.disable_progress_bar()
    with explained():
        question_set = load_questions(find_model(model_path, "cpu").data_dir / QUESTIONS_NAME)
        if mode is DemoMode.BENCHMARK:
            chosen = variants(MODES, [similarity_threshold])
            bench = Bench(
                question_set,
                chosen,
                0.5,
                max_new_tokens,
                max_cache_size,
                num_hyperplanes=num_hyperplanes,
                device=device,
            )
            with progress(NUM_TASKS * len(chosen), console) as advance:
                rows, _ = bench.quality(model_path, NUM_TASKS, advance)
            show_speed(rows, console)
            show_quality(rows, console)
            return
        with console.status("Loading the model ..."):
            network = SharedModel.find(model_path, device=device)
        asking = StreamSettings(
            question_set.system, network.config.separator, max_new_tokens, max_cache_size, num_hyperplanes
        )
        show = _basic if mode is DemoMode.BASIC else _similarity
        show(question_set, network, asking, similarity_threshold, console)


def steps(question_set: QuestionSet) -> dict[str, EvalQuestion]:
    """The first question, itself again, and two near twins, by what each is to the one before."""
    from kvarena.bench.simllm import is_answered_by

    first = question_set.questions[0]
    half = len(first.chunks) // 2
    others = (one for one in question_set.questions[1:] if is_answered_by(one, first.chunks))
    return {
        "a question": first,
        "the same again": first,
        "another question": replace(next(others, first), chunks=first.chunks),
        "notes reordered": replace(first, chunks=(*first.chunks[half:], *first.chunks[:half])),
    }


def _basic(
    question_set: QuestionSet, network: SharedModel, asking: StreamSettings, threshold: float, console: Console
) -> None:
    """In each mode what was reused, what it took, and the answer beside full prefill's."""
    from kvarena.bench.simllm import SimLLMVariant
    from kvarena.contenders.simllm.params import MODES

    asked = steps(question_set)
    for mode in MODES:
        title = f"Mode {mode}, threshold {threshold:g}"
        table = new_table(title, ["prompt"], ["cosine", "reused", "passes", "TTFT", "without"])
        table.add_column("answer")
        table.add_column("without")
        with (
            console.status(f"Asking in mode {mode} ..."),
            network.contenders([SimLLMVariant(mode, threshold), SimLLMVariant()], asking) as contenders,
        ):
            for name, question in asked.items():
                prompt = network.token_ids(question.messages(asking.system, asking.separator))
                answer, without = (one.answer(prompt, asking.max_new_tokens) for one in contenders)
                report = answer.report
                similarity, passes = report.details["similarity"], report.details["num_layer_passes"]
                table.add_row(
                    name,
                    "miss" if similarity is None else f"{similarity:.4f}",
                    f"{report.num_reused_tokens / report.num_prompt_tokens:.0%}",
                    f"{passes / report.details['num_layer_passes_without_reuse']:.0%}",
                    f"{answer.first_token_ms:,.0f}",
                    f"{without.first_token_ms:,.0f}",
                    repr(answer.text.strip()),
                    repr(without.text.strip()),
                )
        console.print(table)
    console.print(
        "cosine: similarity to the earlier prompt that was found; reused: prompt tokens; passes: layer passes over "
        "prompt tokens, of full prefill's; TTFT: time to first token, ms; without: full prefill's",
        style="dim",
    )
    _show_questions({name: question.question for name, question in asked.items()}, console)


def _similarity(
    question_set: QuestionSet, network: SharedModel, asking: StreamSettings, threshold: float, console: Console
) -> None:
    """Cosine and differing hash bits of pairs of prompts: that share their chunks, that don't, that are unrelated.

    What would hit is bold.
    """
    import torch

    from kvarena.contenders.simllm.similarity import ROUNDING
    from kvarena.simllm import LSHIndex

    asked = steps(question_set)
    del asked["the same again"]
    shared = set(asked["a question"].chunks)
    asked["other notes"] = min(question_set.questions, key=lambda question: len(shared & set(question.chunks)))
    chats = {name: question.messages(asking.system, asking.separator) for name, question in asked.items()}
    chats |= {name: [{"role": "user", "content": text}] for name, text in UNRELATED.items()}
    with torch.inference_mode():
        prompts = [torch.tensor(network.token_ids(chat), device=network.module.device) for chat in chats.values()]
        embeddings = torch.stack([network.module.model.task_embedding(prompt).cpu() for prompt in prompts])
    bits = differing_bits(LSHIndex(embeddings.shape[1], asking.num_hyperplanes).compute_hash_batch(embeddings))
    pairs = cosines(embeddings).tolist()

    title = f"Cosine of the prompts' embeddings, and how many of {asking.num_hyperplanes} hash bits differ"
    names = list(chats)
    table = new_table(title, ["prompt"], [str(number) for number in range(1, len(names))])
    num_hits = 0
    for row, name in enumerate(names):
        cells = []
        for column in range(row):
            is_hit = pairs[row][column] >= threshold - ROUNDING
            num_hits += is_hit
            text = f"{pairs[row][column]:.4f}/{bits[row][column]}"
            cells.append(f"[bold green]{text}[/bold green]" if is_hit else text)
        table.add_row(f"{row + 1} {name}", *cells)
    console.print(table)
    num_pairs = len(names) * (len(names) - 1) // 2
    console.print(f"At a threshold of {threshold:g} {num_hits} of {num_pairs} pairs hit; they are bold.")
    _show_questions({name: question.question for name, question in asked.items()} | UNRELATED, console)


def cosines(embeddings: torch.Tensor) -> torch.Tensor:
    """Of each of the embeddings `(N, E)` with each, `(N, N)`."""
    from torch.nn.functional import normalize

    units = normalize(embeddings.double(), dim=1)
    return units @ units.T


def differing_bits(hashes: Sequence[str]) -> list[list[int]]:
    """Hamming distances of hashes of 0 and 1."""
    return [[(int(one, 2) ^ int(other, 2)).bit_count() for other in hashes] for one in hashes]


def _show_questions(questions: Mapping[str, str], console: Console) -> None:
    for name, text in questions.items():
        console.print(f"{name}: {text}", style="dim", markup=False, highlight=False)
