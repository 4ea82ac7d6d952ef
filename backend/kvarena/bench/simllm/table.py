"""A Sim-LLM benchmark's rows in a terminal: a table of speed and one of quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kvarena.bench.results import Row
from kvarena.bench.simllm.contenders import Setup

MEBI = 2**20


def show_speed(rows: Sequence[Row], console: Console) -> None:
    """Times are in milliseconds, memory in MiB."""
    table = _table(
        f"Speed on {_what(rows)}", ("hits", "passes", "req/s", "times", "CPU", "TTFT", "p95", "rise", "kept")
    )
    for row in rows:
        rise = row["peak_rise_bytes"]
        table.add_row(
            _label(row),
            str(row["num_hits"]),
            f"{row['layer_pass_ratio']:.0%}",
            f"{row['throughput_per_s']:.2f}",
            f"{row['throughput_vs_no_reuse']:.2f}",
            f"{row['throughput_vs_no_reuse_by_cpu_time']:.2f}",
            f"{row['ttft_ms']['median']:.0f}",
            f"{row['ttft_ms']['p95']:.0f}",
            "-" if rise is None else f"{rise / MEBI:.0f}",
            f"{row['task_bytes'] / MEBI:.0f}",
        )
    console.print(table)
    console.print(
        "passes: layer passes over prompt tokens, of no reuse's; times: requests per second, by no reuse's; CPU: the "
        "same by CPU time; TTFT, p95: ms; rise: the most that a request made memory rise, kept: KV of tasks, MiB",
        style="dim",
    )


def show_quality(rows: Sequence[Row], console: Console) -> None:
    """All figures are percentages; differences to no reuse are in points."""
    table = _table(f"Quality on {_what(rows)}", ("hits", "exact", "interval", "lost", "similar", "same", "first"))
    for row in rows:
        exact = row["exact_match"]
        table.add_row(
            _label(row),
            str(row["num_hits"]),
            _percent(exact),
            f"{100 * exact['low']:.0f}-{100 * exact['high']:.0f}",
            f"{-100 * row['exact_match_vs_no_reuse']['mean'] + 0.0:.1f}",
            _percent(row["similar_exact_match"]),
            _percent(row["agreement"]),
            _percent(row["first_token_agreement"]),
        )
    console.print(table)
    console.print(
        "exact: exact match; lost: of no reuse's, points; similar: exact match of the similar tasks; same, first: "
        "answers and first tokens that are no reuse's",
        style="dim",
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("contender", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _what(rows: Sequence[Row]) -> str:
    row = rows[0]
    weights = " (random weights)" if row["has_random_weights"] else ""
    return f"{row['model']}{weights}: {row['num_tasks']} tasks, {row['num_similar']} similar"


def _label(row: Row) -> str:
    return Setup(row["mode"], row["similarity_threshold"]).label


def _percent(interval: Mapping[str, float] | None) -> str:
    return f"{100 * interval['mean']:.1f}" if interval else "-"
