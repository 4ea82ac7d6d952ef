"""Where the time of an answer went: every millisecond until the first token stands in one bar."""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import combinations
from pathlib import Path

import pytest

from figures import Figures, with_report
from support.small_openai_server import AI100_REPORT, REPORT
from waterfall import LABELS, Row, bars, read_stages, shown_ms, waterfall_html

STYLE = (Path(__file__).resolve().parents[2] / "frontend" / "style.css").read_text()

TIMES = {"queue_ms": 2.0, "lookup_ms": 1.0, "fetch_ms": 3.0, "prefill_chunks_ms": 0.0, "move_ms": 1.0, "write_ms": 1.5}
BLEND = REPORT | TIMES | {"select_ms": 12.0, "recompute_ms": 18.0, "blend_ms": 35.5}


def times(row: Row) -> dict[str, float]:
    return {stage: end - begin for stage, begin, end in bars(row)}


BLENDED = {"lookup": 1.0, "fetch": 3.0, "move": 2.5, "select": 12.0, "recompute": 18.0}


@pytest.mark.parametrize(
    ("in_pieces", "queue_ms", "first_ms", "others"),
    [
        (False, 4.5, 43.5, {"queue": 4.5, "question": 8.0, "http": 11.0}),
        (True, 40.0, 8.0, {"queue": 4.5, "question": 8.0, "http": 11.0}),
        (False, None, None, {"queue": 2.0, "rest": 21.5}),
    ],
)
def test_the_stages_of_a_blend_and_what_is_left_are_its_time_to_first_token(
    in_pieces: bool, queue_ms: float | None, first_ms: float | None, others: dict[str, float]
) -> None:
    """A blend is done in vLLM's time to the first token, one in pieces in its queue."""
    metrics = {"queue_time_ms": queue_ms, "time_to_first_token_ms": first_ms, "mean_itl_ms": 2.0}
    told = {key: ms for key, ms in metrics.items() if ms is not None}
    stages = with_report(Figures(), BLEND | {"in_pieces": in_pieces}, metrics=told).stages
    found = times(Row("blend", "Blend", 60.0, stages))
    assert found == pytest.approx(BLENDED | others)
    assert sum(found.values()) == pytest.approx(60.0)


def test_a_measured_prefill_leaves_the_rest_to_http() -> None:
    found = times(Row("ai100", "Slots", 20.0, read_stages(AI100_REPORT)))
    assert found == pytest.approx({"http": 7.0, "queue": 0.5, "prefill": 12.5})


def test_a_transfer_after_the_first_token_is_no_stage_before_it() -> None:
    timings = {"tokenize_ms": 3.0, "cache_lookup_ms": 1.0, "transfer_ms": 5000.0, "prefill_ms": 0.0}
    found = times(Row("prefix", "Prefix", 100.0, read_stages({"timings": timings})))
    assert found == pytest.approx({"http": 99.0, "lookup": 1.0})


def test_vllm_tells_its_queue_and_its_prefill_without_a_report() -> None:
    metrics = {"time_to_first_token_ms": 80.0, "queue_time_ms": 6.0, "generation_time_ms": 30.0, "mean_itl_ms": 2.0}
    for report in ({}, {"blend_ms": 0.0, "in_pieces": False, "queue_ms": 9.0}):
        found = times(Row("plain", "Plain", 90.0, read_stages(report, metrics)))
        assert found == pytest.approx({"http": 4.0, "queue": 6.0, "prefill": 80.0})


def test_a_server_without_reports_tells_nothing_apart() -> None:
    row = Row("plain", "<Plain>", 100.0, (), decode_ms=9.0)
    assert times(row) == {"rest": 100.0}
    assert times(dataclasses.replace(row, decode_ms=None)) == {"later": 100.0}, "it may tell them with its end"
    html = waterfall_html([row, Row("blend", "Blend", 50.0, read_stages(BLEND))])
    assert "&lt;Plain&gt;" in html
    assert 'left:0.000%;width:100.000%" title="the rest: HTTP, queue and prefill: 100.0 ms"' in html
    assert "<span>100.0 ms<small" in html
    assert waterfall_html([]) == ""


def test_the_rest_of_the_answer_stands_beside_the_time_and_not_on_the_axis() -> None:
    row = Row("plain", "Plain", 100.0, ())
    before, after = waterfall_html([row]), waterfall_html([dataclasses.replace(row, decode_ms=1234.56)])
    told = '<small data-decode="1234.56" title="What the rest of the answer took, after its first token">'
    assert f"<span>100.0 ms{told}+ 1,235 ms decode</small></span>" in after
    assert "data-decode" not in before
    assert re.findall(r"(?:left|width):[\d.]+%", before) == re.findall(r"(?:left|width):[\d.]+%", after)


@pytest.mark.parametrize("first_token_ms", [0.6, 1.0, 8.01, 10.0, 99.9, 4000.0, 86_000.0])
def test_the_axis_begins_at_0_and_ends_with_the_longest_time(first_token_ms: float) -> None:
    html = waterfall_html([Row("plain", "Plain", first_token_ms, ()), Row("blend", "Blend", first_token_ms / 9, ())])
    assert [float(width) for width in re.findall(r"width:([\d.]+)%", html)] == pytest.approx([100, 100 / 9], abs=1e-3)
    places = [float(left) for left in re.findall(r'<span style="left:([\d.]+)%', html)]
    assert places[0] == 0
    assert places[-1] <= 100
    assert 3 <= len(places) <= 6
    assert html.count(" ms</span></div>") == 3, "of each lane, and of the axis at its end"


def test_times_are_shown_as_precisely_as_they_are_known() -> None:
    shown = [shown_ms(ms) for ms in (0.31, 869.04, 999.97, 35_295.5)]
    assert shown == ["0.3 ms", "869.0 ms", "1,000 ms", "35,296 ms"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_stage_has_a_label_and_a_colour_of_its_own(theme: str) -> None:
    colours = {stage: colour_of(stage, theme) for stage in LABELS}
    for one, other in combinations(colours, 2):
        assert math.dist(colours[one], colours[other]) > 50, (one, other)
    assert len(set(LABELS.values())) == len(LABELS)


def colour_of(stage: str, theme: str) -> tuple[int, ...]:
    (rule,) = re.findall(rf"\.ka-stage-{stage} {{ background: (.+?); }}", STYLE)
    found = re.findall(r"#(\w{6})", rule)
    return tuple(bytes.fromhex(found[-1 if theme == "dark" else 0]))
