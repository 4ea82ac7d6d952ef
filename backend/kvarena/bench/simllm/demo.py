"""Demonstrations of reuse between similar tasks, on questions on chunks, and how a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from kvarena.bench.console import new_table
from kvarena.bench.quality.questions import EvalQuestion, QuestionSet
from kvarena.bench.simllm.running import (
    Contender,
    MeasuredAnswer,
    SharedModel,
    SimLLMVariant,
    StreamSettings,
    is_answered_by,
    warm_up,
)
from kvarena.contenders.simllm.similarity import ROUNDING
from kvarena.simllm import LSHIndex

UNRELATED = {"unrelated": "What is machine learning?", "its twin": "Explain machine learning."}


@dataclass(frozen=True)
class Step:
    """A prompt of a demonstration, and what it is to the one before."""

    name: str
    question: EvalQuestion


@dataclass(frozen=True)
class ShownAnswer:
    """One step with reuse beside the same without."""

    step: Step
    answer: MeasuredAnswer
    without_reuse: MeasuredAnswer


@dataclass(frozen=True)
class Compared:
    """Questions by name, their prompts' cosines `(N, N)`, and in how many bits their hashes differ."""

    questions: Mapping[str, str]
    cosines: torch.Tensor
    num_differing_bits: Sequence[Sequence[int]]
    num_hyperplanes: int


def steps(question_set: QuestionSet) -> list[Step]:
    """The first question of the exam, itself again, and two near twins."""
    first = question_set.questions[0]
    half = len(first.chunks) // 2
    reordered = (*first.chunks[half:], *first.chunks[:half])
    others = (one for one in question_set.questions[1:] if is_answered_by(one, first.chunks))
    return [
        Step("a question", first),
        Step("the same again", first),
        Step("another question", replace(next(others, first), chunks=first.chunks)),
        Step("notes reordered", replace(first, chunks=reordered)),
    ]


def run_steps(
    network: SharedModel, question_set: QuestionSet, variant: SimLLMVariant, asking: StreamSettings
) -> list[ShownAnswer]:
    """In order, by one engine with reuse and one without."""
    contenders = [network.contender(one, asking) for one in (variant, SimLLMVariant())]
    try:
        for contender in contenders:
            warm_up(contender, network, asking)
        return [_shown(network, step, contenders, asking) for step in steps(question_set)]
    finally:
        for contender in contenders:
            contender.engine.close()


def compare(network: SharedModel, question_set: QuestionSet, separator: str, num_hyperplanes: int = 16) -> Compared:
    """Prompts of the exam that share their chunks, others, and two that have nothing to do with them."""
    first, _, *twins = steps(question_set)
    shared = set(first.question.chunks)
    elsewhere = min(question_set.questions, key=lambda question: len(shared & set(question.chunks)))
    asked = {one.name: one.question for one in (first, *twins, Step("other notes", elsewhere))}
    chats = {name: question.messages(question_set.system, separator) for name, question in asked.items()}
    chats |= {name: [{"role": "user", "content": text}] for name, text in UNRELATED.items()}
    embeddings = torch.stack([_embedding(network, network.token_ids(chat)) for chat in chats.values()])
    hashes = LSHIndex(embeddings.shape[1], num_hyperplanes).compute_hash_batch(embeddings)
    questions = {name: question.question for name, question in asked.items()} | UNRELATED
    return Compared(questions, cosines(embeddings), differing_bits(hashes), num_hyperplanes)


def cosines(embeddings: torch.Tensor) -> torch.Tensor:
    """Of each of the embeddings `(N, E)` with each, `(N, N)`."""
    units = torch.nn.functional.normalize(embeddings.double(), dim=1)
    return units @ units.T


def differing_bits(hashes: Sequence[str]) -> list[list[int]]:
    """Hamming distances of hashes of 0 and 1."""
    return [[(int(one, 2) ^ int(other, 2)).bit_count() for other in hashes] for one in hashes]


def _shown(network: SharedModel, step: Step, contenders: Sequence[Contender], asking: StreamSettings) -> ShownAnswer:
    prompt = network.token_ids(step.question.messages(asking.system, asking.separator))
    answers = [contender.answer(prompt, asking.max_new_tokens) for contender in contenders]
    return ShownAnswer(step, *answers)


@torch.inference_mode()
def _embedding(network: SharedModel, token_ids: Sequence[int]) -> torch.Tensor:
    model = network.module.model
    embedding: torch.Tensor = model.task_embedding(torch.tensor(token_ids, device=network.module.device))
    return embedding.cpu()


def show_steps(variant: SimLLMVariant, shown: Sequence[ShownAnswer], console: Console) -> None:
    """What was reused, what it took, and the answer beside full prefill's."""
    title = f"Mode {variant.mode}, threshold {variant.similarity_threshold:g}"
    table = new_table(title, "prompt", figures=("cosine", "reused", "passes", "TTFT", "without"))
    for name in ("answer", "without"):
        table.add_column(name)
    for one in shown:
        report = one.answer.report
        similarity, passes = report.details["similarity"], report.details["num_layer_passes"]
        table.add_row(
            one.step.name,
            "miss" if similarity is None else f"{similarity:.4f}",
            f"{report.num_reused_tokens / report.num_prompt_tokens:.0%}",
            f"{passes / report.details['num_layer_passes_without_reuse']:.0%}",
            f"{one.answer.first_token_ms:,.0f}",
            f"{one.without_reuse.first_token_ms:,.0f}",
            _quoted(one.answer.text),
            _quoted(one.without_reuse.text),
        )
    console.print(table)


def explain_steps(shown: Sequence[ShownAnswer], console: Console) -> None:
    console.print(
        "cosine: similarity to the earlier prompt that was found; reused: prompt tokens; passes: layer passes over "
        "prompt tokens, of full prefill's; TTFT: time to first token, ms; without: full prefill's",
        style="dim",
    )
    _show_questions({one.step.name: one.step.question.question for one in shown}, console)


def show_compared(compared: Compared, threshold: float, console: Console) -> None:
    """Cosine and differing bits of each pair; what would hit is bold."""
    title = f"Cosine of the prompts' embeddings, and how many of {compared.num_hyperplanes} hash bits differ"
    names = list(compared.questions)
    table = new_table(title, "prompt", figures=[str(number) for number in range(1, len(names))])
    num_hits = 0
    for row, name in enumerate(names):
        cells = []
        for column in range(row):
            cosine = float(compared.cosines[row, column])
            is_hit = cosine >= threshold - ROUNDING
            num_hits += is_hit
            text = f"{cosine:.4f}/{compared.num_differing_bits[row][column]}"
            cells.append(f"[bold green]{text}[/bold green]" if is_hit else text)
        table.add_row(f"{row + 1} {name}", *cells)
    console.print(table)
    num_pairs = len(names) * (len(names) - 1) // 2
    console.print(f"At a threshold of {threshold:g} {num_hits} of {num_pairs} pairs hit; they are bold.")
    _show_questions(compared.questions, console)


def _show_questions(questions: Mapping[str, str], console: Console) -> None:
    for name, text in questions.items():
        console.print(f"{name}: {text}", style="dim", markup=False, highlight=False)


def _quoted(text: str) -> str:
    return repr(text.strip())
