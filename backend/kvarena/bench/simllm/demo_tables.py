"""The demonstrations in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kvarena.bench.simllm.contenders import Setup
from kvarena.bench.simllm.demo import Compared, ShownAnswer
from kvarena.simllm.similarity import ROUNDING


def show_steps(setup: Setup, shown: Sequence[ShownAnswer], console: Console) -> None:
    """What was reused, what it took, and the answer beside full prefill's."""
    title = f"Mode {setup.mode}, threshold {setup.similarity_threshold:g}"
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("prompt", no_wrap=True)
    for name in ("cosine", "reused", "passes", "TTFT", "without"):
        table.add_column(name, justify="right", no_wrap=True)
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
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("prompt", no_wrap=True)
    names = list(compared.questions)
    for number in range(1, len(names)):
        table.add_column(str(number), justify="right", no_wrap=True)
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
