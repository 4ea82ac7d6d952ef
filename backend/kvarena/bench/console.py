"""What the measuring commands have in common: options, errors in one line, progress, lists of numbers, results.

Imported by the command line at its start, so rich is imported inside the functions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

    from kvarena.bench.results import Row


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


WIDTH_WITHOUT_TERMINAL = 240
"""Paths, addresses and the rows of tables aren't folded where a program reads them, or a file keeps them."""


def console_for(as_json: bool) -> Console:
    """Where tables and progress go; not to standard output where that is JSON."""
    from rich.console import Console

    file = sys.stderr if as_json else sys.stdout
    return Console(file=file, width=None if file.isatty() else WIDTH_WITHOUT_TERMINAL)


@contextmanager
def explained(output: Path | None = None) -> Iterator[None]:
    """What a user can put right is told in a line; first of all, that `output` can't be written."""
    from rich.console import Console
    from rich.markup import escape

    try:
        if output:
            from kvarena.bench.results import check_writable

            check_writable(output)
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


def new_table(title: str, *texts: str | Column, figures: Sequence[str], **layout: Any) -> Table:
    """Columns of texts, then of figures. `layout` is rich's."""
    from rich import box
    from rich.table import Column, Table

    columns = [Column(one, no_wrap=True) if isinstance(one, str) else one for one in texts]
    columns += [Column(name, justify="right", no_wrap=True) for name in figures]
    return Table(*columns, title=title, box=box.SIMPLE_HEAD, **layout or {"collapse_padding": True})


def percent(interval: Mapping[str, float] | None) -> str:
    """Of a mean that is a share; a dash where there is none."""
    return f"{100 * interval['mean']:.1f}" if interval else "-"


def percent_range(interval: Mapping[str, float] | None) -> str:
    return f"{100 * interval['low']:.0f}-{100 * interval['high']:.0f}" if interval else "-"


def save_and_tell(
    output: Path,
    settings: Mapping[str, Any],
    rows: Sequence[Row],
    as_json: bool,
    console: Console,
    show: Callable[[], None],
    *,
    has_picture: bool = True,
    **details: Any,
) -> None:
    """The result file, and the picture of its kind beside it; told as JSON on standard output, or as tables by `show`
    and where they are.
    """
    from kvarena.bench.plotting import save_picture
    from kvarena.bench.results import load_results, save_results
    from kvarena.panels.kinds import RESULT_KINDS

    save_results(output, settings, rows, **details)
    benchmark, image = settings["benchmark"], output.with_suffix(".png")
    has_picture = has_picture and RESULT_KINDS[benchmark].picture is not None
    if has_picture:
        save_picture(output, image, benchmark)
    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        show()
        console.print(f"Figures are in {output}{f', the plot in {image}' if has_picture else ''}.", soft_wrap=True)
