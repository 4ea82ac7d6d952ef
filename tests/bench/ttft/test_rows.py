"""Rows from answers whose times are given: ratios are taken pair by pair."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from kvarena.bench.quality.asking import Reuse
from kvarena.bench.ttft.client import Burst, Timed
from kvarena.bench.ttft.measuring import Measured, cell_rows, show_rows, show_warnings
from kvarena.bench.ttft.workload import Cell
from kvarena.bench.variants import Variant

PLAIN, BLEND, OTHER = Variant("plain"), Variant("blend", "kv_deviation", 0.15), Variant("mine")
CELL = Cell(1000, "warm", 1)


def timed(ttft_s: float, *, sent_s: float = 0.0, num_tokens: int = 5, **more: Any) -> Timed:
    """Tokens after the first take 0.1 s each."""
    return Timed(sent_s, sent_s + ttft_s, sent_s + ttft_s + 0.1 * (num_tokens - 1), num_tokens, **more)


def rows_of(**bursts: list[Burst]) -> list[dict[str, Any]]:
    variants = {"plain": PLAIN, "blend": BLEND, "mine": OTHER}
    measured = [Measured(variants[name], name != "mine", found) for name, found in bursts.items()]
    return cell_rows(CELL, measured, "plain")


def test_ratios_are_taken_prompt_by_prompt() -> None:
    """Each pair is 10, 2 and 4 times; the ratio of the medians would be 5."""
    plain = [Burst([timed(ttft)]) for ttft in (1.0, 2.0, 8.0)]
    blend = [Burst([timed(ttft)]) for ttft in (0.1, 1.0, 2.0)]
    first, second = rows_of(plain=plain, blend=blend)
    assert second["speedup_vs_plain"] == {"median": 4.0, "low": 2.0, "high": 10.0}
    assert first["speedup_vs_plain"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert second["ttft_ms"]["median"] == 1000
    assert second["tpot_ms"] == {"median": 100.0, "p95": 100.0}
    assert second["e2e_ms"]["median"] == 1400


def test_the_interval_of_a_median_leaves_single_outliers_out_once_there_are_enough_pairs() -> None:
    """With six pairs it is all of them, with more it isn't; five can't say."""
    plain = [Burst([timed(1.0)]) for _ in range(12)]
    blend = [Burst([timed(1 / speedup)]) for speedup in (2, 2.2, 2.1, 2.3, 1.9, 0.1, 2, 2.2, 2.1, 2.3, 1.9, 9)]
    for num_pairs, interval in ((5, None), (6, {"low": 0.1, "high": 2.3}), (12, {"low": 1.9, "high": 2.3})):
        _, row = rows_of(plain=plain[:num_pairs], blend=blend[:num_pairs])
        assert row["speedup_interval"] == interval
    assert rows_of(blend=blend)[0]["speedup_interval"] is None


def test_throughput_is_that_of_whole_bursts() -> None:
    """Two requests in 2.4 s and in 0.9 s, of which the second was sent 0.1 s later."""
    plain = [Burst([timed(1.0), timed(2.0)])]
    blend = [Burst([timed(0.2), timed(0.4, sent_s=0.1)])]
    first, second = rows_of(plain=plain, blend=blend)
    assert first["requests_per_s"]["median"] == pytest.approx(2 / 2.4, abs=1e-3)
    assert second["throughput_vs_plain"]["median"] == pytest.approx(2.4 / 0.9, abs=1e-3)
    assert (second["num_requests"], second["num_failed"]) == (2, 0)


def test_a_failed_request_is_counted_and_its_pair_left_out() -> None:
    plain = [Burst([timed(1.0)]), Burst([timed(1.0)])]
    blend = [Burst(["out of memory"]), Burst([timed(0.25)])]
    _, row = rows_of(plain=plain, blend=blend)
    assert (row["num_requests"], row["num_failed"], row["failure"]) == (2, 1, "out of memory")
    assert row["speedup_vs_plain"] == {"median": 4.0, "low": 4.0, "high": 4.0}
    assert row["requests_per_s"]["median"] == pytest.approx(1 / 0.65, abs=1e-3)
    only = rows_of(plain=[Burst([timed(1.0)])], blend=[Burst(["gone"])])[1]
    assert [only[name] for name in ("ttft_ms", "speedup_vs_plain", "throughput_vs_plain", "stages_ms")] == [None] * 4


def test_shares_of_the_prompt_add_up_and_stages_are_the_reports() -> None:
    report = {
        "store_hits": 3,
        "store_misses": 1,
        "fetch_ms": 5.0,
        "select_ms": 20.0,
        "blend_ms": 30.0,
        "max_ttft_ms": 500.0,
        "ratio": 0.1,
    }
    answer = timed(0.1, reuse=Reuse(1000, 700, 100), report=report)
    row = rows_of(blend=[Burst([answer], before_bytes=5, peak_bytes=9), Burst([answer], 7, 8)])[0]
    assert (row["reused_ratio"], row["recomputed_ratio"], row["computed_ratio"]) == (0.7, 0.1, 0.2)
    assert row["stages_ms"] == {"fetch": 5.0, "select": 20.0, "prefill": 70.0, "decode": 400.0}
    assert (row["idle_rss_bytes"], row["peak_rss_bytes"]) == (5, 9)
    assert (row["num_store_hits"], row["num_store_misses"]) == (6, 2)
    assert row["speedup_vs_plain"] is None, "nothing to compare with"


def test_a_contender_that_does_not_blend_has_no_policy() -> None:
    row = rows_of(plain=[Burst([timed(0.1, num_tokens=1)])])[0]
    assert (row["policy"], row["ratio"], row["store"], row["tpot_ms"]) == (None, None, "warm", None)
    assert row["stages_ms"] == {"prefill": 100.0, "decode": 0.0}
    assert row["reused_ratio"] is None


def test_what_a_strangers_store_holds_is_unknown() -> None:
    row = rows_of(mine=[Burst([timed(0.1)])])[0]
    assert (row["store"], row["prompts"]) == ("unknown", "warm")


def test_the_table_and_what_not_to_believe() -> None:
    missed = {"store_hits": 2, "store_misses": 2, "blend_ms": 1.0}
    answers: list[Timed | str] = [timed(0.1, reuse=Reuse(100, 90), report=missed), "no [memory]"]
    measured = [Measured(PLAIN, True, [Burst([timed(1.0), timed(1.0)])]), Measured(BLEND, True, [Burst(answers)])]
    rows = cell_rows(CELL, measured, "plain", num_known_chunks=3)
    console = Console(file=io.StringIO(), width=200)
    show_rows(rows, console)
    show_warnings(rows, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "10.00 (10.00-10.00)" in shown
    assert "1 of 2 requests failed: no [memory]" in shown
    assert "not in the store any more in 1 rows, the first: blend kv_deviation 15 %, warm, 1,000 tokens" in shown
