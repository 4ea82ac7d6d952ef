"""The rows on a terminal, and what to know before believing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """A section for each cell."""
    title = "Time to first token (TTFT), medians; sooner than plain by, with the least and greatest of pairs"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("contender")
    for name in ("TTFT ms", "sooner by", "req/s", "reused", "redone", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        if not index or _cell(row) != _cell(rows[index - 1]):
            table.add_section()
            table.add_row(f"[bold]{_cell(row)}")
        table.add_row(
            Setup.of_row(row).label,
            _figure(row["ttft_ms"], "median", "{:,.0f}"),
            _ratio(row["speedup_vs_plain"]),
            _figure(row["requests_per_s"], "median", "{:.2f}"),
            *(_share(row[f"{name}_ratio"]) for name in ("reused", "recomputed")),
            "-" if row["peak_rss_bytes"] is None else f"{row['peak_rss_bytes'] / 2**20:,.0f}",
        )
    console.print(table)


def show_troubles(rows: Sequence[Row], console: Console) -> None:
    """Requests that failed, and stores that had lost what they should have known."""
    for row in rows:
        if row["num_failed"]:
            failed = f"{row['num_failed']} of {row['num_requests']} requests failed"
            reason = escape(row["failure"])
            console.print(f"[red]{Setup.of_row(row).label}, {row['context_tokens']:,} tokens: {failed}[/red]: {reason}")
    lost = [row for row in rows if _has_lost_chunks(row)]
    if lost:
        first = f"{Setup.of_row(lost[0]).label}, {lost[0]['store']}, {lost[0]['context_tokens']:,} tokens"
        console.print(
            f"[yellow]Known chunks were not in the store any more in {len(lost)} rows[/yellow], the first: {first}. "
            "Give the store more memory (--store-gb).",
            soft_wrap=True,
        )


def _has_lost_chunks(row: Row) -> bool:
    if row["num_store_hits"] is None or row["policy"] is None:
        return False
    return bool(row["num_store_hits"] < row["num_known_chunks"] * (row["num_requests"] - row["num_failed"]))


def _cell(row: Row) -> str:
    chunks = "no chunks" if row["prompts"] == "none" else row["prompts"]
    return f"{row['context_tokens']:,} tokens, {chunks}, {row['concurrency']} at once"


def _figure(figures: Mapping[str, float] | None, name: str, form: str) -> str:
    return form.format(figures[name]) if figures else "-"


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "-"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
