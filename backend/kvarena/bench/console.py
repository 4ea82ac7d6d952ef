"""What the measuring commands have in common: options, errors in one line, progress, lists of numbers, results.

Imported by the command line at its start, so rich is imported inside the functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
ResultFile = Annotated[Path, typer.Option(help="The result file.")]
PlottedFile = Annotated[Path, typer.Option(help="Result file; the plot is saved next to it.")]
Model = Annotated[
    str | None, typer.Option(help="A local folder or a Hugging Face model name. [default: the town model]")
]
Shape = Annotated[str | None, typer.Option(help="A model of this size with random weights: 180m, 500m or 1b.")]
AnswerTokens = Annotated[int, typer.Option(min=2, help="Tokens of each answer.")]
Repetitions = Annotated[int, typer.Option(min=1, help="Repetitions of each measurement.")]
Seed = Annotated[int, typer.Option(help="Seed of the texts.")]

SPEED_WINDOW_S = 600.0
INTERRUPTED = 130
"""The exit status of a command that was interrupted, as a shell has it."""


@contextmanager
def explained() -> Iterator[None]:
    """What a user can put right is told in a line."""
    from rich.console import Console
    from rich.markup import escape

    try:
        yield
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def progress(num_steps: int, console: Console, text: str = "measuring") -> Iterator[Callable[[], None]]:
    with counted_progress(console, text, num_steps) as advance:
        yield lambda: advance(None, None)


@contextmanager
def counted_progress(
    console: Console, text: str, num_steps: int | None = None
) -> Iterator[Callable[[int | None, int | None], None]]:
    """Called with how many of how many steps are done, where that is known only on the way; else with one more."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    # a step may take seconds or a fraction of one, in turn: what is left goes by many of them
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, speed_estimate_period=SPEED_WINDOW_S) as bar:
        task = bar.add_task(text, total=num_steps)

        def advance(done: int | None, total: int | None) -> None:
            bar.advance(task) if done is None else bar.update(task, completed=done, total=total)

        yield advance


def integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is no list of whole numbers separated by commas") from error


def decimals(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is no list of numbers separated by commas") from error


def choice_among(name: str, value: str, choices: Sequence[str]) -> str:
    """The value. Raises `ValueError` naming the choices for another one."""
    if value not in choices:
        raise ValueError(f"--{name} is {value!r}; it is one of {', '.join(choices)}")
    return value


def tell(output: Path, as_json: bool, console: Console, show: Callable[[], None], image: Path | None = None) -> None:
    """A saved result: as JSON on standard output, or as its tables and where it is."""
    from kvarena.bench.results import load_results

    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        show()
        console.print(f"Figures are in {output}{f', the plot in {image}' if image else ''}.", soft_wrap=True)
