"""Result files of every kind as the page draws them: charts, bars, legends, and two files compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from comparing import comparison
from eval_results import read_result
from kvarena.panels.kinds import RESULT_KINDS, panels_of
from kvarena.panels.panel import COLOURS, Axis, Bar, Panel, Series
from kvarena.panels.quality import share_panel, time_panel
from panel_charts import (
    BIG_LETTERS_PX,
    MIN_SPAN,
    bars_html,
    draw_chart,
    legend_html,
    panel_chart,
    ttft_chart,
    y_domain,
)
from support.small_eval_result import small_eval_result
from support.small_ttft_result import small_ttft_result

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "docs" / "results").glob("*.json"))
TIMES = {"median": 20.0, "p95": 30.0}
BLEND = {"contender": "blend", "policy": "kv_deviation", "ratio": 0.15, "check_layer": 1, "options": {}}


def small(benchmark: str, *rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"settings": {"benchmark": benchmark, **more.pop("settings", {})}, "rows": list(rows), **more}


def calibration(chosen: dict[str, Any] | None) -> dict[str, Any]:
    rows = [
        BLEND
        | {"ratio": ratio, "recomputed_ratio": ratio, "num_questions": 6, "num_failed": 0}
        | {"token_agreement": {"mean": 0.9 + ratio / 10, "low": 0.8, "high": 1.0}}
        | {"sink_tokens": sink_tokens, "ttft_ms": {"median": 900 * ratio + sink_tokens}}
        for ratio in (0.1, 0.5)
        for sink_tokens in (0, 1)
    ]
    return small("calibrate", *rows, settings={"agreement": 0.94, "chosen": chosen})


FIFTHS = [
    BLEND
    | {"first_request": first, "num_requests": 10, "ttft_ms": TIMES, "hit_ratio": 0.8}
    | {"speedup_vs_plain": {"median": 3.0, "low": 2.0, "high": 4.0}}
    for first in (0, 10, 20)
]
FAULTS = [{"kind": "killed", "service": "blend", "at_s": 5.0, "back_s": 45.5}]
UNSHIPPED = {
    "sustained": small("sustained", *FIFTHS),
    "device": small(
        "device",
        {"check": "ratio 1", "family": "llama", "difference": 1e-6},
        *(
            BLEND
            | {
                "shape": "180m",
                "context_tokens": context,
                "ttft_ms": TIMES,
                "stages_ms": {"fetch": 1.0, "recompute": 3.0},
            }
            | {"speedup_vs_full": {"median": 3.0, "low": 2.0, "high": 4.0}, "num_reused_tokens": 900}
            for context in (1000, 4000)
        ),
    ),
    "decode": small("decode", {"contender": "engine", "context_tokens": 500, "tpot_ms": TIMES}),
    "soak": small(
        "soak",
        {"contender": "blend", "num_requests": 9, "num_same": 7, "num_tie": 2, "ttft_ms": TIMES},
        {"contender": "plain", "num_requests": 9, "num_same": 9, "ttft_ms": None},
        faults=FAULTS,
    ),
    "calibrate": calibration({"policy": "kv_deviation", "ratio": 0.5, "check_layer": 1, "sink_tokens": 0}),
}


def drawn(panel: Panel) -> str:
    """Everything of it, as it goes to the browser."""
    body = bars_html(panel.bars) if panel.bars else json.dumps(panel_chart(panel).to_dict())
    return body + legend_html(panel)


def kinds() -> list[Any]:
    shipped = [pytest.param(path.read_text(), id=path.stem) for path in SHIPPED]
    return [*shipped, *(pytest.param(json.dumps(found), id=name) for name, found in UNSHIPPED.items())]


@pytest.mark.parametrize("text", kinds())
def test_every_file_that_the_project_writes_opens_with_all_that_it_has(text: str) -> None:
    result = read_result(text)
    for panel in panels_of(result):
        shown = drawn(panel)
        assert all(bar.note in shown for bar in panel.bars) if panel.bars else panel.series
        assert all(series.label in shown for series in panel.series)
        assert all(level.label in shown for level in panel.levels)
        if not panel.bars:
            low, high = y_domain(panel)
            assert all(low <= y <= high for series in panel.series for y in series.y), panel.title


def test_every_kind_is_tried_here() -> None:
    shipped = {json.loads(path.read_text())["settings"]["benchmark"] for path in SHIPPED}
    source = SHIPPED[0].parents[2] / "backend" / "kvarena"
    written = {
        found for path in source.rglob("*.py") for found in re.findall(r'"benchmark": "(\w+)"', path.read_text())
    }
    assert shipped | set(UNSHIPPED) == set(RESULT_KINDS) == written


def test_the_chosen_setting_is_marked_and_what_was_wanted_goes_across() -> None:
    (panel,) = panels_of(UNSHIPPED["calibrate"])
    (mark,) = (series for series in panel.series if series.is_mark)
    assert (mark.label, list(mark.x), list(mark.y)) == ("chosen: blend kv_deviation 50 % @1 sink 0", [450], [95.0])
    assert [level.label for level in panel.levels] == ["wanted: 94 %"]
    assert "ka-ring" in legend_html(panel)
    (panel,) = panels_of(calibration(None))
    assert not any(series.is_mark for series in panel.series)
    assert "no setting reaches" in panel.title


def test_faults_and_outcomes_of_a_soak_run() -> None:
    ended, times, faults = panels_of(UNSHIPPED["soak"])
    assert [part[:2] for part in ended.bars[0].parts] == [("same", 7), ("tie", 2)]
    assert [bar.label for bar in times.bars] == ["blend"]
    assert [(bar.label, bar.note) for bar in faults.bars] == [("blend, killed", "40.5 s")]


def test_an_axis_of_percents_keeps_equal_figures_equal_and_within_what_can_be() -> None:
    rows = [row for row in small_eval_result()["rows"] if (row["kind"], row["subset"]) == ("all", "all")]
    for draw in (share_panel, time_panel):
        low, high = y_domain(draw(rows, "exact_match", "all", COLOURS))
        assert 0 <= low < high <= 100
    rows = [row | {"exact_match": {"mean": 1.0, "low": 1.0, "high": 1.0}} for row in rows]
    assert y_domain(share_panel(rows, "exact_match", "all", COLOURS)) == (100 - MIN_SPAN / 2, 100)


def test_notes_that_would_lie_over_one_another_are_left_to_the_tooltip() -> None:
    near = Series("plain", "a", [100, 101, 300], [50, 50, 90], [50, 50, 90], [50, 50, 90], notes=["1 %", "2 %", "9 %"])
    chart = panel_chart(Panel("", Axis("x"), Axis("y", limits=(0, 100)), [near])).to_dict()
    assert [record["note"] for record in chart["layer"][-1]["data"]["values"]] == ["1 %", "9 %"]


@pytest.mark.parametrize("is_big", [True, False])
def test_letters_of_a_chart_are_large_on_a_big_screen(monkeypatch: pytest.MonkeyPatch, is_big: bool) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("panel_charts.state.is_big_screen", lambda: is_big)
    monkeypatch.setattr("panel_charts.st.altair_chart", lambda chart, width: shown.append(chart.to_dict()))
    series = Series("plain", "a", [1.0, 2.0], [50.0, 60.0], [50.0, 60.0], [50.0, 60.0])
    draw_chart(panel_chart(Panel("", Axis("x"), Axis("y", limits=(0, 100)), [series], colours=COLOURS)))
    draw_chart(ttft_chart([{"variant": "plain", "ttft_ms": 9.0, "question": "Who?"}]))
    for chart in shown:
        sizes = [chart["config"].get("axis", {}).get(name) for name in ("labelFontSize", "titleFontSize")]
        sizes.append(chart["config"].get("text", {}).get("fontSize"))
        assert sizes == [BIG_LETTERS_PX if is_big else None] * 3
    assert len(shown) == 2


def test_names_from_files_stay_text() -> None:
    bar = Bar("<script>", [("<script>", 1.0, "#111111")], "<script>")
    shown = bars_html([bar]) + legend_html(Panel("", Axis(""), bars=[bar]))
    assert "<script>" not in shown
    assert shown.count("&lt;script&gt;") == 4


# -- two files ---------------------------------------------------------------------------------------------------------


def changed_eval() -> dict[str, Any]:
    """The same, but that `kv_deviation 10 %` got two of eight more wrong."""
    found = small_eval_result()
    answers = [a for a in found["answers"] if (a["policy"], a["ratio"]) == ("kv_deviation", 0.1)]
    for answer in answers[:2]:
        answer["correct"] = answer["exact_match"] = 1.0 - answer["correct"]
    return found


def test_evals_differ_question_by_question() -> None:
    (panel,) = comparison(small_eval_result(), changed_eval(), "correct")
    by_label = {series.label: series for series in panel.series}
    line = by_label["blend kv_deviation @1"]
    assert list(line.y) == [-25.0, 0.0]
    assert line.low[0] < -25 < line.high[0]
    assert (line.low[1], line.high[1]) == (0.0, 0.0)
    assert [level.y for level in panel.levels] == [0.0]
    assert "8 questions in both" in panel.title
    assert drawn(panel)


def test_evals_without_single_answers_differ_by_their_means() -> None:
    first = small_eval_result() | {"answers": []}
    second = json.loads(json.dumps(first))
    for row in second["rows"]:
        row["correct"]["mean"] -= 0.1
    (panel,) = comparison(first, second, "correct")
    assert "of the means" in panel.title
    assert all(y == pytest.approx(-10) for series in panel.series for y in series.y)


def test_times_are_compared_row_by_row() -> None:
    first, second = small_ttft_result(), small_ttft_result()
    for row in second["rows"]:
        row["ttft_ms"]["median"] *= 2
    panels = comparison(first, second, "")
    conditions = ["warm store; medians", "cold store; medians", "8 requests at once; medians"]
    assert [panel.title.rpartition(", ")[2] for panel in panels] == conditions
    assert {y for panel in panels for series in panel.series for y in series.y} == {2.0}
    assert {bar.parts[0][1] for bar in panels[-1].bars} == {2.0}
    assert comparison(first, second | {"rows": []}, "") == []


@pytest.mark.parametrize("name", sorted(UNSHIPPED))
def test_a_file_beside_itself_is_as_fast(name: str) -> None:
    for panel in comparison(UNSHIPPED[name], UNSHIPPED[name], ""):
        assert {bar.parts[0][1] for bar in panel.bars} == {1.0}
        assert drawn(panel)
