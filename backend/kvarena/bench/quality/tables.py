"""An eval's rows in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kvarena.bench.quality.rows import ALL_KINDS
from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row


def show_rows(rows: Sequence[Row], kinds: Sequence[str], console: Console) -> None:
    """Two narrow tables: exact match over all questions and by kind; then the other figures, over all."""
    shown = kinds if len(kinds) > 1 else []
    troubles = [name for name in ("unparsed", "failed") if any(row[f"num_{name}"] for row in rows)]
    right = Table(title="Exact match (%), 95 % intervals", box=box.SIMPLE_HEAD, collapse_padding=True)
    other = Table(title="Closeness to full prefill, speed, trouble", box=box.SIMPLE_HEAD, collapse_padding=True)
    for table, names in (
        (right, ("all", "interval", *shown)),
        (other, ("recomputed", "reused", "F1", "same", "KL", "TTFT ms", *troubles)),
    ):
        table.add_column("contender", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right")
    for row in rows:
        if row["kind"] != ALL_KINDS:
            continue
        by_kind = {one["kind"]: one for one in rows if _label(one) == _label(row)}
        exact = row["exact_match"]
        between = f"{100 * exact['low']:.0f}-{100 * exact['high']:.0f}" if exact else "-"
        right.add_row(_label(row), _mean(exact), between, *(_mean(by_kind[kind]["exact_match"]) for kind in shown))
        other.add_row(
            _label(row),
            *("-" if row[name] is None else f"{row[name]:.0%}" for name in ("recomputed_ratio", "reused_ratio")),
            _mean(row["f1"]),
            _mean(row["agreement"]),
            f"{row['first_token_kl']['mean']:.3f}" if row["first_token_kl"] else "-",
            f"{row['ttft_ms']['median']:,.0f}" if row["ttft_ms"] else "-",
            *(str(row[f"num_{name}"]) for name in troubles),
        )
    console.print(right)
    console.print(other)


def _label(row: Row) -> str:
    return Setup.of_row(row).label


def _mean(interval: Mapping[str, float] | None) -> str:
    return f"{100 * interval['mean']:.1f}" if interval else "-"
