"""From what context length on it pays: what is said is what was measured, and no more."""

from __future__ import annotations

import math
from typing import Any

import pytest

from context_lengths import (
    LEAST_PAIRS,
    LengthVerdict,
    Point,
    failures,
    length_verdicts,
    lengths_table,
    note_of,
    verdicts_html,
)
from figures import Figures
from settings import Contender

BLEND = Contender("blend", "Blend", "http://127.0.0.1:1", approximate=True)


def point(num_tokens: int, speedup: float, spread: float = 1.1) -> Point:
    """Its interval goes from the speedup by `spread` to the speedup times it."""
    return Point(num_tokens, speedup, speedup / spread, speedup * spread)


def verdict(*points: Point) -> LengthVerdict:
    return LengthVerdict("blend", points)


def row(num_tokens: int, speedup: float | None, contender: str = "blend", **more: Any) -> dict[str, Any]:
    """Of twelve pairs; None: all failed."""
    interval = {"low": speedup / 1.1, "high": speedup * 1.1} if speedup else None
    is_blend = contender == "blend"
    return {
        "contender": contender,
        "policy": "kv_deviation" if is_blend else None,
        "ratio": 0.15 if is_blend else None,
        "check_layer": None,
        "options": {},
        "context_tokens": num_tokens,
        "store": "warm" if is_blend else "unknown",
        "prompts": "warm",
        "concurrency": 1,
        "num_requests": 12,
        "num_failed": 0 if speedup else 12,
        "failure": None if speedup else "<b>out of memory</b>",
        "ttft_ms": {"median": 100.0, "p95": 120.0} if speedup else None,
        "speedup_vs_plain": {"median": speedup, "low": 0.5, "high": 99.0} if speedup else None,
        "speedup_interval": interval,
        "reused_ratio": 0.9 if is_blend else None,
        "recomputed_ratio": 0.1 if is_blend else None,
    } | more


def result(*rows: dict[str, Any], model: str = "small") -> dict[str, Any]:
    plain = [row(one["context_tokens"], 1.0, "plain") for one in rows]
    servers = {"plain": {"url": "http://127.0.0.1:2"}, "blend": {"url": BLEND.url, "model": model}}
    return {"settings": {"benchmark": "ttft", "contenders": servers}, "rows": [*plain, *rows]}


def test_the_crossing_is_between_the_lengths_at_which_it_is_slower_and_faster() -> None:
    """Half as fast at 500 tokens and twice at 2,000: on logarithmic axes the middle is at 1,000."""
    found = verdict(point(500, 0.5), point(2000, 2.0), point(4000, 3.0))
    assert found.crossing_tokens == 1000
    assert found.text() == "faster than plain from about 1,000 tokens on, up to 4,000, the longest measured"
    assert found.note() == "Slower at 500 tokens, faster at 2,000; interpolated in between."
    assert found.tone == "gain"


@pytest.mark.parametrize(("before", "after"), [(0.5, 1.2), (0.9, 1.12), (0.2, 9.0), (0.9, 50.0)])
def test_a_crossing_never_leaves_the_two_lengths_by_rounding(before: float, after: float) -> None:
    crossing = verdict(point(996, before, 1.01), point(1004, after, 1.01)).crossing_tokens
    assert crossing is not None
    assert 996 <= crossing <= 1004


def test_where_it_is_faster_everywhere_nothing_is_said_of_shorter_contexts() -> None:
    found = verdict(point(500, 1.5), point(4000, 3.0))
    assert found.crossing_tokens is None
    assert found.text() == "faster than plain at every measured length, 500 to 4,000 tokens"
    assert found.note() == ""


def test_a_tie_before_a_gain_is_no_crossing_that_could_be_computed() -> None:
    for speedup in (0.98, 1.0, 1.05):
        found = verdict(point(500, 0.5), point(1000, speedup), point(2000, 2.0))
        assert found.crossing_tokens is None
        assert found.text() == "faster than plain at 2,000 tokens, the longest measured"
        assert found.note() == "At 1,000 tokens no difference can be told."


@pytest.mark.parametrize(
    ("points", "tone", "text"),
    [
        (
            [point(500, 1.0), point(1000, 1.05)],
            "tie",
            "no difference from plain can be told at every measured length, 500 to 1,000 tokens",
        ),
        ([point(500, 0.5), point(900, 0.6)], "loss", "slower than plain at every measured length, 500 to 900 tokens"),
        ([point(500, 0.5), point(1000, 0.98)], "tie", "faster than plain at no measured length"),
        ([point(500, 1.0), point(1000, 0.5)], "loss", "faster than plain at no measured length"),
        (
            [point(500, 2.0), point(1000, 2.0), point(2000, 0.5)],
            "loss",
            "faster than plain at 500 and 1,000 tokens, but not at the longest measured length",
        ),
        ([point(500, 2.0)], "gain", "faster than plain at the only measured length, 500 tokens"),
        ([point(500, 0.5)], "loss", "slower than plain at the only measured length, 500 tokens"),
        ([point(500, 1.0)], "tie", "no difference from plain can be told at the only measured length, 500 tokens"),
        ([point(500, 0.5), point(1000, 2.0), point(2000, 1.0)], "tie", "faster than plain at 1,000 tokens, but not"),
        ([], "tie", "no answers beside plain's to compare"),
    ],
)
def test_without_a_crossing(points: list[Point], tone: str, text: str) -> None:
    found = verdict(*points)
    assert found.crossing_tokens is None
    assert found.tone == tone
    assert found.text().startswith(text)


def test_the_interval_of_the_median_decides_and_not_the_range() -> None:
    (found,) = length_verdicts(result(row(500, 0.5), row(2000, 2.0)))
    assert (found.label, found.tone, found.crossing_tokens) == ("blend kv_deviation 15 %", "gain", 1000)
    (found,) = length_verdicts(result(row(2000, 2.0, speedup_interval=None, num_requests=5)))
    assert found.tone == "tie", "the range of fewer pairs stands for it, and has 1 in it"


def test_few_pairs_say_nothing_however_close_they_are() -> None:
    equal = {"median": 2.0, "low": 2.0, "high": 2.0}
    few = row(2000, 2.0, speedup_vs_plain=equal, speedup_interval=None, num_requests=LEAST_PAIRS - 1)
    (found,) = length_verdicts(result(few))
    assert found.points == (Point(2000, 2.0, 0.0, math.inf),)
    assert found.tone == "tie"
    table = lengths_table(result(few))
    assert [(line["Speedup"], line["Low"], line["High"]) for line in table] == [(None,) * 3, (2.0, None, None)]


def test_a_contender_that_failed_is_named_with_the_reason_and_the_others_are_compared() -> None:
    found = result(row(500, 2.0), row(2000, 3.0), row(500, None, "mine"), row(2000, None, "mine"))
    blend, mine = length_verdicts(found)
    assert blend.tone == "gain"
    assert mine.points == ()
    assert mine.text() == "nothing to compare: <b>out of memory</b>"
    assert failures(found) == ["mine: 24 of 24 requests failed, the first with: <b>out of memory</b>"]
    assert "&lt;b&gt;out of memory" in verdicts_html([mine])
    assert lengths_table(found)[-1] | {"TTFT median": None, "Speedup": None, "Failed": 12} == lengths_table(found)[-1]


def test_a_length_at_which_it_failed_is_named() -> None:
    (found,) = length_verdicts(result(row(500, 0.5), row(2000, 2.0), row(4000, None)))
    assert [one.num_tokens for one in found.points] == [500, 2000]
    assert found.crossing_tokens == 1000
    assert found.text().endswith("up to 2,000, the longest measured; no answers at 4,000 tokens")


def test_pairs_count_and_not_ones_own_answers() -> None:
    """Plain failed in five of six."""
    alone = {"median": 2.0, "low": 2.0, "high": 2.0}
    (found,) = length_verdicts(result(row(2000, 2.0, num_pairs=1, speedup_vs_plain=alone, speedup_interval=None)))
    assert found.tone == "tie"


def test_without_plain_nothing_is_compared() -> None:
    assert length_verdicts({"settings": {}, "rows": [row(500, None)]}) == []


def test_other_stores_and_many_requests_at_once_are_left_out() -> None:
    others = [row(8000, 0.1, prompts="cold", store="cold"), row(9000, 0.1, concurrency=8)]
    (found,) = length_verdicts(result(row(500, 2.0), *others))
    assert [one.num_tokens for one in found.points] == [500]


SAID = (
    "Measured over context lengths: faster than plain from about 1,000 tokens on, up to 2,000, the longest measured. "
    "Slower at 500 tokens, faster at 2,000; interpolated in between."
)


def test_other_layers_are_another_setting_and_files_in_another_form_say_nothing() -> None:
    figures = Figures(policy="kv_deviation", ratio=0.15)
    rows = [row(500, 0.5), row(2000, 2.0), row(500, 0.4, check_layer=3), row(2000, 3.0, check_layer=3)]
    assert note_of(result(*rows), BLEND, figures, "small") == ""
    broken = result(row(500, 0.5), row(2000, 2.0))
    for one in broken["rows"]:
        del one["num_requests"]
    assert note_of(broken, BLEND, figures, "small") == ""
    assert note_of(result(row(500, 0.5)) | {"settings": {"contenders": ["plain"]}}, BLEND, figures, "small") == ""


@pytest.mark.parametrize(
    ("figures", "model", "says"),
    [
        (Figures(policy="kv_deviation", ratio=0.15), "small", SAID),
        (Figures(policy="kv_deviation", ratio=0.15, max_ttft_ms=300.0), "small", ""),
        (Figures(policy="kv_deviation"), "small", ""),
        (Figures(policy="kv_deviation", ratio=0.3), "small", ""),
        (Figures(policy="chunk_head", ratio=0.15), "small", ""),
        (Figures(policy="kv_deviation", ratio=0.15), "another", ""),
        (Figures(policy="kv_deviation", ratio=0.15), "", ""),
    ],
)
def test_a_measurement_is_of_one_server_with_one_model_and_one_setting(figures: Figures, model: str, says: str) -> None:
    measured = result(row(500, 0.5), row(2000, 2.0))
    note = note_of(measured, BLEND, figures, model)
    assert note == says
    elsewhere = Contender("blend", "Blend", "http://10.0.0.1:1", approximate=True)
    assert note_of(measured, elsewhere, figures, model) == ""
