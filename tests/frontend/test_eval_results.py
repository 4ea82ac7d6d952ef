"""Result files of `kvarena eval`: found, read, and shaped into points, tables and charts."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval_results import (
    EvalResult,
    answer_table,
    cached_note,
    measured_panels,
    metrics_of,
    problems,
    read_eval,
    read_result,
    summary,
    table,
)
from kvarena.panels.panel import COLOURS
from kvarena.panels.quality import METRICS, share_panel
from result_picker import find_result_files
from support.small_eval_result import small_eval_result

PLAIN, BLIND = "plain", "blend none 0 % @1"


@pytest.fixture
def result() -> EvalResult:
    return read(small_eval_result())


def read(found: dict[str, Any]) -> EvalResult:
    return read_eval(read_result(json.dumps(found)))


def test_a_result_is_read_with_its_gaps(result: EvalResult) -> None:
    assert result.kinds == ["all", "single", "across"]
    assert result.reference == PLAIN
    assert len(result.variants) == 4
    row = table(result, "all")[0]
    assert (row["Exact match"], row["EM low"], row["EM high"]) == (0.9, 0.8, 1.0)
    assert (row["Agreement"], row["KL"]) == (None, None)
    assert result.answers[BLIND, 0]["detail"] == "HTTP 500"
    assert summary(result) == "town, engine http · 8 questions · full prefill: plain · A small one, 2 cores"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "it has no settings"),
        ("3", "it has no settings"),
        ("{}", "it has no settings"),
        ('{"settings": {}}', "it has no list of rows"),
        ('{"settings": {"benchmark": "other"}, "rows": [{}]}', "'other' is none of ttft, eval,"),
        ('{"settings": {"benchmark": "prefix"}, "rows": []}', "rows is empty"),
        (
            '{"settings": {"benchmark": "prefix"}, "rows": [{}]}',
            "other rows than the benchmark prefix writes: no 'level'",
        ),
    ],
)
def test_what_is_no_result_says_why_in_a_line(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        read_result(text)
    assert "\n" not in str(raised.value)


def test_nesting_without_end_is_an_error_to_tell() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        read_result("[" * 100_000)


def without_kind(found: dict[str, Any]) -> None:
    del found["rows"][0]["kind"]


def text_for_a_number(found: dict[str, Any]) -> None:
    found["rows"][0]["ttft_ms"]["median"] = "fast"


def number_for_a_group(found: dict[str, Any]) -> None:
    found["rows"][0]["f1"] = 0.9


def without_rows(found: dict[str, Any]) -> None:
    found["rows"] = []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_kind, "'kind' is missing"),
        (text_for_a_number, "fast"),
        (number_for_a_group, "wrong type"),
        (without_rows, "rows is empty"),
    ],
)
def test_a_spoilt_result_says_what_is_wrong(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    found = small_eval_result()
    spoil(found)
    with pytest.raises(ValueError, match=message):
        read(found)


def test_files_are_found_newest_first_and_shipped_ones_last(tmp_path: Path) -> None:
    shipped = tmp_path / "docs"
    for age_s, name in enumerate(("results/new.json", "results/deep/er/old.json", "docs/ours.json", "results/no.txt")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        os.utime(path, (1e9 - age_s, 1e9 - age_s))
    files = find_result_files(tmp_path / "results", shipped)
    assert [file.name for file in files] == ["new.json", "deep/er/old.json", "ours.json"]
    assert files[2].title == "ours.json · came with the project"
    assert len(find_result_files(shipped, shipped)) == 1
    own = find_result_files(tmp_path / "results" / "deep", tmp_path / "nowhere", shipped)
    assert [file.link for file in own] == ["er/old.json", "page/ours.json"]
    assert find_result_files(tmp_path / "nowhere", tmp_path / "nor-here") == []


def test_variants_are_named_by_what_tells_them_apart(result: EvalResult) -> None:
    assert "blend kv_deviation 10 % @1" in result.variants

    found = small_eval_result()
    found["rows"] += [{**copy.deepcopy(found["rows"][-1]), "check_layer": 2}]
    assert read(found).variants == [*result.variants, "blend kv_deviation 50 % @2"]
    found["rows"] += [{**copy.deepcopy(found["rows"][-1]), "contender": "other"}]
    assert read(found).variants[-1] == "other kv_deviation 50 % @2"


def test_a_setting_has_one_label_in_files_and_on_the_page() -> None:
    """By it a file names its reference."""
    whole = {"contender": "blend", "policy": "kv_deviation", "ratio": 1.0, "check_layer": 2}
    some = {"contender": "blend", "policy": "kv_deviation", "ratio": 0.15, "options": {"deviation": "values"}}
    labels = ("blend kv_deviation 100 % @2", "blend kv_deviation (deviation values) 15 %")
    for row, label in zip((whole, some), labels, strict=True):
        result = EvalResult({"settings": {"reference": label}, "rows": [row]})
        assert result.reference == result.variants[0] == label


def test_a_blend_of_everything_can_be_the_reference() -> None:
    found = small_eval_result()
    found["rows"] = [row for row in found["rows"] if row["contender"] == "blend"]
    for row in found["rows"]:
        if row["policy"] == "none":
            row.update(policy="all", ratio=None, check_layer=None, recomputed_ratio=None)
    found["settings"]["reference"] = "blend all"
    result = read(found)
    assert result.reference == "blend all"
    panel = share_panel([row for row in found["rows"] if row["kind"] == "all"], "exact_match", "all", COLOURS)
    assert {level.label for level in panel.levels} == {"blend all"}


def test_table_has_no_zero_for_what_is_not_known(result: EvalResult) -> None:
    plain, blind, *_ = table(result, "single")
    assert (plain["Agreement"], plain["KL"], plain["Ratio"]) == (None, None, None)
    assert (blind["Failed"], blind["Cut"], blind["Ratio"]) == (1, 0, 0.0)
    assert problems(result, "all") == "Of 32 answers 1 failed."
    assert problems(result, "across") == ""


def test_every_figure_twice(result: EvalResult) -> None:
    assert result.subsets == ["all", "answered"]
    assert [record["Questions"] for record in table(result, "single", "answered")] == [3] * 4
    assert table(result, "all")[1]["KL along answer"] == 0.5
    assert metrics_of(result) == [key for key in METRICS if key != "first_token_kl"]


def test_an_older_file_opens_with_what_it_has() -> None:
    shipped = Path(__file__).resolve().parents[2] / "docs" / "results" / "eval-town.json"
    result = read(json.loads(shipped.read_text()))
    assert result.subsets == ["all"]
    assert metrics_of(result) == ["exact_match", "f1", "agreement", "first_token_kl"]
    first = table(result, "all")[0]
    assert first["Cut"] == 0
    assert "Right" not in first
    shown = answer_table(result, "all", result.variants[:1], only_different=False)
    assert list(shown[0].values())[2].startswith("✓ ")


def test_a_cut_answer_is_shown_as_cut() -> None:
    found = small_eval_result()
    found["answers"][0] |= {"is_complete": False}
    result = read(found)
    assert answer_table(result, "all", [PLAIN], only_different=False)[0]["plain"] == "✓ cider …"


def test_answers_side_by_side(result: EvalResult) -> None:
    every = answer_table(result, "all", [PLAIN, BLIND], only_different=False)
    assert len(every) == 8
    assert every[0] | {"Question": ""} == {
        "Question": "",
        "Gold": "cider",
        "plain": "✓ cider",
        BLIND: "⚠ failed: HTTP 500",
    }
    assert len(answer_table(result, "all", [PLAIN, BLIND], only_different=True)) == 5
    assert answer_table(result, "single", [PLAIN], only_different=True) == []


def test_measure_draws_agreement_and_right_answers_with_intervals_as_far_as_they_are_known() -> None:
    found = small_eval_result()
    agreement, right = measured_panels(found)
    assert agreement.title.startswith("Agreement (all questions) against the share of recomputed tokens")
    assert right.title.startswith("Right answers (all questions)")
    (line,) = (series for series in right.series if "kv_deviation" in series.label)
    assert [(list(ends)) for ends in (line.x, line.y)] == [[10, 50], [90, 90]]
    assert list(line.low) == pytest.approx([80, 80])
    assert list(line.high) == pytest.approx([100, 100])
    assert [(level.name, level.y) for level in agreement.levels] == [("plain", 100)], "full prefill"
    for row in found["rows"]:
        row["correct"] = None  # nobody said what is right
    (panel,) = measured_panels(found)
    assert panel.title == agreement.title


def test_prompts_that_a_prefix_cache_had_are_told() -> None:
    row = {"kind": "all", "subset": "all", "contender": "plain", "policy": None, "ratio": None, "num_questions": 3}

    def result_of(*rows: dict[str, Any]) -> EvalResult:
        return EvalResult({"settings": {}, "rows": rows})

    assert cached_note(result_of(row | {"num_cached": 0}, row)) == ""
    told = cached_note(result_of(row | {"num_cached": 2}, row | {"num_cached": 1, "kind": "single"}))
    assert told == "Prompts that were mostly in a prefix cache, and are fast for that reason: plain: 2 of 3."
