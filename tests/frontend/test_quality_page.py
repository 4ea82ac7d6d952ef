"""The page Quality in Streamlit's own test runner, over folders of result files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

import settings
from support.small_eval_result import small_eval_result

APP = Path(__file__).resolve().parents[2] / "frontend" / "app.py"
Open = Callable[..., AppTest]


@pytest.fixture
def open_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Open:
    """The page over files with these texts, by name."""
    entry = {"name": "plain", "title": "Plain", "url": "http://127.0.0.1:9"}
    monkeypatch.setenv("KVARENA_CONTENDERS", json.dumps([entry]))
    monkeypatch.setenv("KVARENA_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("KVARENA_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setattr(settings, "SHIPPED_RESULTS_DIR", tmp_path / "shipped")

    def page(**texts: str) -> AppTest:
        for name, text in texts.items():
            path = tmp_path / "results" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        st.cache_resource.clear()
        opened = AppTest.from_file(str(APP), default_timeout=20).run()
        opened = opened.switch_page("views/quality.py").run()
        assert not opened.exception, opened.exception
        return opened

    return page


def num_charts(page: AppTest) -> int:
    assert not page.exception, page.exception
    return len(page.get("vega_lite_chart"))


def test_a_result_is_drawn_and_tabulated(open_page: Open) -> None:
    page = open_page(run=json.dumps(small_eval_result()))
    assert num_charts(page) == 2
    assert len(page.dataframe[0].value) == 4
    assert page.dataframe[0].value["Agreement"].isna().tolist() == [True, False, False, False]
    assert [warning.value for warning in page.warning] == ["Of 32 answers 1 failed."]


def test_metric_and_kind_are_chosen(open_page: Open) -> None:
    page = open_page(run=json.dumps(small_eval_result()))
    page.button_group(key="kind").set_value("across").run()
    assert page.dataframe[0].value["Questions"].tolist() == [4] * 4
    assert not page.warning
    page.button_group(key="metric").set_value("kl_along_answer").run()
    assert num_charts(page) == 2
    page.button_group(key="subset").set_value("answered").run()
    assert num_charts(page) == 2
    assert page.dataframe[0].value["Questions"].tolist() == [3] * 4


def test_a_kind_without_figures_of_the_metric_says_so(open_page: Open) -> None:
    found = small_eval_result()
    for row in found["rows"]:
        if row["kind"] == "across":
            row["agreement"] = None
    page = open_page(run=json.dumps(found))
    page.button_group(key="kind").set_value("across").run()
    page.button_group(key="metric").set_value("agreement").run()
    assert num_charts(page) == 0
    assert "no figures" in page.info[0].value
    assert len(page.dataframe[0].value) == 4


def test_an_older_file_has_no_choice_of_subset(open_page: Open) -> None:
    shipped = Path(__file__).resolve().parents[2] / "docs" / "results" / "eval-town.json"
    page = open_page(run=shipped.read_text())
    assert num_charts(page) == 2
    assert [group.key for group in page.button_group] == ["metric", "kind"]


def test_answers_that_differ_from_full_prefill(open_page: Open) -> None:
    page = open_page(run=json.dumps(small_eval_result()))
    assert len(page.dataframe[1].value) == 8
    page.toggle(key="only-different").set_value(True).run()
    assert len(page.dataframe[1].value) == 5
    assert page.dataframe[1].value["none · 0 %"][0] == "⚠ failed: HTTP 500"


def test_without_results_the_page_says_how_to_make_one(open_page: Open) -> None:
    page = open_page(other='{"settings": {"benchmark": "prefix"}, "rows": []}')
    assert num_charts(page) == 0
    assert "kvarena eval" in page.code[0].value
    assert not page.warning


def test_a_broken_file_is_named_and_the_others_work(open_page: Open) -> None:
    page = open_page(half='{"settings": {', run=json.dumps(small_eval_result()))
    assert "half.json" in page.warning[0].value
    assert num_charts(page) == 2
    assert len(page.selectbox(key="result-file").options) == 1


def test_the_chosen_file_is_shown_and_a_kind_that_it_lacks_forgotten(open_page: Open) -> None:
    small = small_eval_result()
    small["rows"] = [row for row in small["rows"] if (row["kind"], row["subset"]) == ("all", "all")][:2]
    page = open_page(run=json.dumps(small_eval_result()), small=json.dumps(small))
    by_name = {title.split(" · ")[0]: title for title in page.selectbox(key="result-file").options}
    page.selectbox(key="result-file").select(by_name["run.json"]).run()
    page.button_group(key="kind").set_value("across").run()
    page.selectbox(key="result-file").select(by_name["small.json"]).run()
    assert num_charts(page) == 2
    assert len(page.dataframe[0].value) == 2


def test_bad_setting_is_shown_and_not_a_traceback(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_CONTENDERS", "nonsense")
    page = open_page()
    assert "KVARENA_CONTENDERS" in page.error[0].value
