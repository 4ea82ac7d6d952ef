"""What the measuring commands have in common: errors in one line, progress, lists of numbers.

Imported by the command line at its start, so rich is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console


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
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    # a step may take seconds or a fraction of one, in turn: what is left goes by many of them
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, speed_estimate_period=SPEED_WINDOW_S) as bar:
        task = bar.add_task(text, total=num_steps)
        yield lambda: bar.advance(task)


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
