"""What the measuring commands share: options, one-line errors, progress bars, lists of numbers, tables, saved results.

Imported when the command line starts, so rich is imported inside the functions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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

INTERRUPTED = 130
"""The exit status of an interrupted command, as in a shell."""
SPEED_WINDOW_S = 600.0
WIDTH_WITHOUT_TERMINAL = 240
"""Wide enough not to fold paths, addresses and table rows in pipes and files."""


def console_for(as_json: bool) -> Console:
    """For tables and progress; standard error where standard output is JSON."""
    from rich.console import Console

    file = sys.stderr if as_json else sys.stdout
    return Console(file=file, width=None if file.isatty() else WIDTH_WITHOUT_TERMINAL)


@contextmanager
def explained(output: Path | None = None) -> Iterator[None]:
    """Turns errors that a user can fix into one line and exit status 1; first checks that `output` can be written."""
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


class Advance(Protocol):
    """One step more; or `done` of `total` steps, where the total is only known on the way."""

    def __call__(self, done: int | None = None, total: int | None = None) -> None: ...


@contextmanager
def progress(num_steps: int | None, console: Console, text: str = "measuring") -> Iterator[Advance]:
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    # Steps may take seconds or milliseconds, in turn: the time left is estimated over many of them.
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, speed_estimate_period=SPEED_WINDOW_S) as bar:
        task = bar.add_task(text, total=num_steps)

        def advance(done: int | None = None, total: int | None = None) -> None:
            bar.advance(task) if done is None else bar.update(task, completed=done, total=total)

        yield advance


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


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


def read_target(text: str, option: str = "--target") -> tuple[str, str]:
    """Name and address of a server given as NAME=URL. Raises `ValueError`."""
    name, _, url = text.partition("=")
    if not name or not url:
        raise ValueError(f"{option} is {text!r}; it is NAME=URL")
    return name, url if "://" in url else f"http://{url}"


def new_table(title: str, texts: Sequence[str], figures: Sequence[str], min_width: int = 0, **layout: Any) -> Table:
    """Text columns, then columns of figures. With a `min_width`, texts may be folded down to it. `layout` is rich's."""
    from rich import box
    from rich.table import Column, Table

    columns = [Column(name, no_wrap=not min_width, min_width=min_width or None) for name in texts]
    columns += [Column(name, justify="right", no_wrap=True) for name in figures]
    return Table(*columns, title=title, box=box.SIMPLE_HEAD, **layout or {"collapse_padding": True})


Column = str | Callable[["Row"], str]
"""A format string over a row's values, such as `{ttft_ms[median]:,.1f}`, or a function of the row."""


def table_of(
    title: str,
    rows: Iterable[Row],
    texts: Mapping[str, Column],
    figures: Mapping[str, Column],
    *,
    section: Callable[[Row], str] | None = None,
    min_width: int = 0,
    **layout: Any,
) -> Table:
    """A line for each row; a figure that is None is a dash. `section` heads the rows that it has one text for."""
    table = new_table(title, list(texts), list(figures), min_width, **layout)
    heading = None
    for row in rows:
        if section and section(row) != heading:
            heading = section(row)
            table.add_section()
            table.add_row(f"[bold]{heading}")
        table.add_row(*(_cell(cell, row) for cell in (*texts.values(), *figures.values())))
    return table


def _cell(cell: Column, row: Row) -> str:
    if not isinstance(cell, str):
        return cell(row)
    try:
        return cell.format_map(row)
    except TypeError:  # None has no figures and no number format
        return "-"


def percent(interval: Mapping[str, float] | None) -> str:
    """The mean of a share, in percent; a dash where there is none."""
    return f"{100 * interval['mean']:.1f}" if interval else "-"


def percent_range(interval: Mapping[str, float] | None) -> str:
    return f"{100 * interval['low']:.0f}-{100 * interval['high']:.0f}" if interval else "-"


def save_and_tell(
    output: Path,
    settings: Mapping[str, Any],
    rows: Sequence[Row],
    as_json: bool,
    console: Console,
    show: Callable[[Sequence[Row], Console], None],
    *,
    has_picture: bool = True,
    **details: Any,
) -> None:
    """Saves the result file, with the picture of its kind beside it; prints JSON, or the tables and where the files
    are.
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
        show(rows, console)
        console.print(f"Figures are in {output}{f', the plot in {image}' if has_picture else ''}.", soft_wrap=True)
