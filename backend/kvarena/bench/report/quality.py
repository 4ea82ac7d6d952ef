"""Quality against the share of recomputed tokens: results of `kvarena eval`."""

from __future__ import annotations

from kvarena.bench.quality.plot import by_share, by_time
from kvarena.bench.report.files import ResultFile
from kvarena.bench.report.parts import Part
from kvarena.bench.report.tables import rows_table
from kvarena.bench.series import Styles

METRICS = ("exact_match", "agreement")


def make(file: ResultFile, styles: Styles) -> Part:
    """Each metric for each kind of question; exact match over all of them against time too."""
    panels = [panel for metric in METRICS for panel in by_share(file.result, metric, styles)]
    panels += by_time(file.result, "exact_match", styles)[:1]
    return Part(panels, [rows_table("Quality, closeness to full prefill, and speed", file.rows)])
