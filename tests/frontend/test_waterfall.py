"""Where the time of an answer went: every millisecond until the first token stands in one bar."""

from __future__ import annotations

import pytest

from figures import Figures, with_report
from support.small_openai_server import AI100_REPORT, REPORT
from waterfall import QUESTION, Row, bars, read_stages, waterfall_html

TIMES = {"queue_ms": 2.0, "lookup_ms": 1.0, "fetch_ms": 3.0, "prefill_chunks_ms": 0.0, "move_ms": 1.0, "write_ms": 1.5}
BLEND = REPORT | TIMES | {"select_ms": 12.0, "recompute_ms": 18.0, "blend_ms": 35.5}


def labels(row: Row) -> dict[str, float]:
    return {label: end - begin for _, label, begin, end in bars(row)}


def test_the_stages_of_a_blend_and_what_is_left_are_its_time_to_first_token() -> None:
    stages = with_report(Figures(), BLEND).stages
    found = labels(Row("blend", "Blend", 50.0, 80.0, stages))
    assert found == pytest.approx(
        {
            "queue": 2.0, "look-up": 1.0, "fetch": 3.0, "move and write": 2.5, "choose": 12.0,
            "recompute": 18.0, QUESTION: 11.5, "decode": 30.0,
        }
    )  # fmt: skip


def test_a_measured_prefill_leaves_the_rest_to_http() -> None:
    found = labels(Row("ai100", "Slots", 20.0, 0.0, read_stages(AI100_REPORT)))
    assert found == pytest.approx({"HTTP and tokenizing": 7.0, "queue": 0.5, "prefill": 12.5})


def test_a_transfer_after_the_first_token_is_no_stage_before_it() -> None:
    stages = read_stages({"timings": {"tokenize_ms": 3.0, "cache_lookup_ms": 1.0, "transfer_ms": 5000.0}})
    found = labels(Row("prefix", "Prefix", 100.0, 5200.0, stages))
    assert found == pytest.approx({"HTTP and tokenizing": 3.0, "look-up": 1.0, QUESTION: 96.0, "decode": 5100.0})


def test_vllm_tells_its_queue_and_its_prefill_without_a_report() -> None:
    metrics = {"time_to_first_token_ms": 80.0, "queue_time_ms": 6.0, "generation_time_ms": 30.0, "mean_itl_ms": 2.0}
    found = labels(Row("plain", "Plain", 90.0, 120.0, read_stages(metrics)))
    assert found == pytest.approx({"HTTP and tokenizing": 4.0, "queue": 6.0, "prefill": 80.0, "decode": 30.0})


def test_a_server_without_reports_tells_nothing_apart() -> None:
    row = Row("plain", "<Plain>", 100.0, 100.0, ())
    assert labels(row) == {"HTTP, queue and prefill, not told apart": 100.0}
    html = waterfall_html([row, Row("blend", "Blend", 50.0, 900.0, read_stages(BLEND))])
    assert "&lt;Plain&gt;" in html
    assert 'left:0.000%;width:80.000%" title="HTTP, queue and prefill' in html
    assert "<span>100 ms</span>" in html
    assert waterfall_html([]) == ""


@pytest.mark.parametrize("first_token_ms", [0.02, 1.0, 8.01, 10.0, 99.9, 4000.0, 86_000.0])
def test_the_axis_has_two_to_five_ticks(first_token_ms: float) -> None:
    html = waterfall_html([Row("plain", "Plain", first_token_ms, first_token_ms, ())])
    assert 2 <= html.partition('class="ka-ticks"')[2].partition("</div>")[0].count("<span") <= 5
