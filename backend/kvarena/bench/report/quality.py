"""Quality against the share of recomputed tokens: results of `kvarena eval`."""

from __future__ import annotations

from kvarena.bench.quality.plot import by_share, by_time, main_metric
from kvarena.bench.report.files import ResultFile
from kvarena.bench.report.parts import Part
from kvarena.bench.report.tables import rows_table
from kvarena.bench.series import Styles

COMPARISONS = ("agreement", "token_agreement", "kl_along_answer")


def make(file: ResultFile, styles: Styles) -> Part:
    """Each metric that the file has for each kind of question; right answers to all of them against time too."""
    right = main_metric(file.result)
    panels = [panel for metric in (right, *COMPARISONS) for panel in by_share(file.result, metric, styles)]
    panels += by_time(file.result, right, styles)[:1]
    return Part(panels, [rows_table("Quality, closeness to full prefill, and speed", file.rows)])
