"""`kvarena report`: reads the command line, writes the page, prints where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvarena.bench.console import console_for, explained
from kvarena.bench.report.parts import DEFAULT_PATTERN


def report(
    results: Annotated[
        list[str] | None,
        typer.Argument(help=f"Result files, folders of them, or patterns. [default: {DEFAULT_PATTERN}]"),
    ] = None,
    output: Annotated[Path, typer.Option(help="The page.")] = Path("results/report.html"),
) -> None:
    """Make one HTML page from result files: speed, quality, where the time goes, settings, tables to copy."""

    from kvarena.bench.report.page import render
    from kvarena.bench.report.parts import read_files

    console = console_for(False)
    with explained():
        files = read_files(results or [])
        count = f"{len(files)} result file{'s' * (len(files) != 1)}"
        with console.status(f"Drawing {count} ..."):
            page = render(files)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    console.print(f"The report of {count} is in {output}.", soft_wrap=True, markup=False)
