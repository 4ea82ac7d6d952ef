"""Benchmarks that draw themselves, and those that nobody here knows: their pictures, if any, and all their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvarena.bench import ai100_plot, prefix_plot
from kvarena.bench.panels import Panel
from kvarena.bench.report.files import ResultFile
from kvarena.bench.report.parts import Part
from kvarena.bench.report.tables import rows_table
from kvarena.bench.results import grouped
from kvarena.bench.series import Styles
from kvarena.bench.simllm import plot as simllm_plot

PANELS: dict[str, Callable[[Mapping[str, Any]], list[Panel]]] = {
    "prefix": prefix_plot.panels,
    "simllm": simllm_plot.panels,
    "ai100": ai100_plot.panels,
}


def make(file: ResultFile, styles: Styles) -> Part:
    """A table for each `measure`, where a benchmark has several."""
    draw = PANELS.get(file.benchmark)
    measures = grouped(file.rows, lambda row: str(row.get("measure", "")))
    tables = [rows_table(measure.capitalize() or "Rows", rows) for measure, rows in measures.items()]
    return Part(draw(file.result) if draw and file.rows else (), tables)
