"""An eval's rows in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kvarena.bench.quality.rows import ALL_KINDS
from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row

TITLES = {"all": "All {} questions", "answered": "The {} that full prefill answers right"}


def show_rows(rows: Sequence[Row], kinds: Sequence[str], console: Console) -> None:
    """Narrow tables: right answers by kind; then all figures, over all questions and over those answered right."""
    shown = kinds if len(kinds) > 1 else []
    of_all = [row for row in rows if row["kind"] == ALL_KINDS]
    extra = ["recomputed"] if any(_says_no_share(row) for row in of_all) else []
    right = _table("Right answers (%), 95 % intervals", (*extra, "all", "interval", *shown))
    for row in of_all:
        if row["subset"] == "all":
            by_kind = {one["kind"]: one for one in rows if _label(one) == _label(row) and one["subset"] == "all"}
            right.add_row(
                _label(row),
                *("-" if row["recomputed_ratio"] is None else f"{row['recomputed_ratio']:.0%}" for _ in extra),
                _mean(row["correct"]),
                _interval(row["correct"]),
                *(_mean(by_kind[kind]["correct"]) if kind in by_kind else "-" for kind in shown),
            )
    console.print(right)
    for subset, title in TITLES.items():
        if found := [row for row in of_all if row["subset"] == subset]:
            console.print(_figures(found, title.format(max(row["num_questions"] for row in found))))


def _figures(rows: Sequence[Row], title: str) -> Table:
    troubles = [name for name in ("cut", "failed") if any(row[f"num_{name}"] for row in rows)]
    table = _table(title, ("right", "EM", "F1", "same", "tokens", "KL", "TTFT ms", *troubles))
    for row in rows:
        kl, ttft = row["kl_along_answer"], row["ttft_ms"]
        table.add_row(
            _label(row),
            *(_mean(row[name]) for name in ("correct", "exact_match", "f1", "agreement", "token_agreement")),
            f"{kl['mean']:.3f}" if kl else "-",
            f"{ttft['median']:,.0f}" if ttft else "-",
            *(str(row[f"num_{name}"]) for name in troubles),
        )
    return table


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("contender", min_width=14)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _says_no_share(row: Row) -> bool:
    """Whether the row's label leaves open how much was recomputed, as with a number of tokens or a time."""
    return row["ratio"] is None and row["policy"] not in (None, "none", "all")


def _label(row: Row) -> str:
    return Setup.of_row(row).label


def _interval(interval: Mapping[str, float] | None) -> str:
    return f"{100 * interval['low']:.0f}-{100 * interval['high']:.0f}" if interval else "-"


def _mean(interval: Mapping[str, float] | None) -> str:
    return f"{100 * interval['mean']:.1f}" if interval else "-"
