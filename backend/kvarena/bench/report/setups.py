"""Rows of `kvarena bench ttft` by what was measured: setup, context length, store, number of requests at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row, grouped
from kvarena.bench.series import Series, drawn_name

UNKNOWN = "unknown"
STORES = {"half": "half-warm store", "none": "no known chunk", UNKNOWN: "store not known"}


def setup_label(row: Row) -> str:
    """Such as `blend kv_deviation 15 % @2`, where 2 is the check layer."""
    return Setup.of_row(row).label


def conditions(row: Row) -> str:
    """Such as `warm store` or `warm store, 8 requests at once`.

    What is known of a server's store may be nothing; `prompts` says what it was sent, the same for all contenders.
    """
    state = row["store"] if row["store"] != UNKNOWN else row.get("prompts", UNKNOWN)
    at_once = f", {row['concurrency']} requests at once" if row["concurrency"] > 1 else ""
    return STORES.get(state, f"{state} store") + at_once


def over_context(rows: Sequence[Row], figures: Callable[[Row], tuple[float, float, float] | None]) -> list[Series]:
    """A line for each setup; `figures` are the middle and both ends of the whiskers, None where there are none."""
    found: list[Series] = []
    for label, of_setup in grouped(rows, setup_label).items():
        points = [(row["context_tokens"], *ends) for row in of_setup if (ends := figures(row))]
        if points:
            x, y, low, high = zip(*sorted(points), strict=True)
            name = drawn_name(of_setup[0])
            variant = sum(other.name == name for other in found)
            found.append(Series(name, label, x, y, low, high, variant))
    return found
