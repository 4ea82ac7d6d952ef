"""`kvarena simllm demo`: three demonstrations for a terminal. Heavy imports are inside the command."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from kvarena.bench.console import console_for, explained, progress

if TYPE_CHECKING:
    from rich.console import Console

    from kvarena.bench.quality.questions import QuestionSet
    from kvarena.bench.simllm.measuring import Bench
    from kvarena.bench.simllm.running import SharedModel, StreamSettings


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Reuse between similar tasks (Sim-LLM).")

NUM_TASKS = 12


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
    from kvarena.bench.simllm.demo import compare, show_compared
    from kvarena.bench.simllm.measuring import Bench
    from kvarena.bench.simllm.running import SharedModel, StreamSettings, variants
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
            _benchmark(bench, model_path, console)
            return
        with console.status("Loading the model ..."):
            network = SharedModel.find(model_path, device=device)
        separator = network.config.separator
        asking = StreamSettings(question_set.system, separator, max_new_tokens, max_cache_size, num_hyperplanes)
        if mode is DemoMode.BASIC:
            _basic(question_set, network, asking, similarity_threshold, console)
        else:
            compared = compare(network, question_set, separator, num_hyperplanes)
            show_compared(compared, similarity_threshold, console)


def _basic(
    question_set: QuestionSet,
    network: SharedModel,
    asking: StreamSettings,
    similarity_threshold: float,
    console: Console,
) -> None:
    from kvarena.bench.simllm.demo import explain_steps, run_steps, show_steps
    from kvarena.bench.simllm.running import SimLLMVariant
    from kvarena.contenders.simllm.params import MODES

    for reuse in MODES:
        variant = SimLLMVariant(reuse, similarity_threshold)
        with console.status(f"Asking in mode {reuse} ..."):
            shown = run_steps(network, question_set, variant, asking)
        show_steps(variant, shown, console)
    explain_steps(shown, console)


def _benchmark(bench: Bench, model_path: str | None, console: Console) -> None:
    from kvarena.bench.simllm.measuring import show_quality, show_speed

    with progress(NUM_TASKS * len(bench.variants), console) as advance:
        measured = bench.quality(model_path, NUM_TASKS, advance)
    show_speed(measured.rows, console)
    show_quality(measured.rows, console)
