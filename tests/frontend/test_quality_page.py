"""The page Quality in Streamlit's own test runner, over folders of result files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import streamlit as st
from streamlit.runtime.state.query_params import QueryParams
from streamlit.testing.v1 import AppTest

import settings
from support.small_eval_result import small_eval_result
from support.small_ttft_result import small_ttft_result

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
        opened = AppTest.from_file(str(APP), default_timeout=60).run()
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
    assert page.dataframe[1].value["blend none 0 % @1"][0] == "⚠ failed: HTTP 500"


def test_without_results_the_page_says_how_to_make_one(open_page: Open) -> None:
    page = open_page(other='{"settings": {"benchmark": "prefix"}, "rows": []}')
    assert num_charts(page) == 0
    assert "kvarena eval" in page.code[0].value
    assert "other.json" in page.warning[0].value
    assert "nothing was measured" in page.warning[0].value


def test_a_file_of_another_kind_has_its_panels_and_rows_and_is_compared_with_its_kind(open_page: Open) -> None:
    ttft = json.dumps(small_ttft_result())
    page = open_page(one=ttft, two=ttft, run=json.dumps(small_eval_result()))
    by_name = {title.split(" · ")[0]: title for title in page.selectbox(key="result-file").options}
    page.selectbox(key="result-file").select(by_name["one.json"]).run()
    assert num_charts(page) == 4, "times and speedups, warm and cold"
    assert len(page.dataframe[0].value) == len(small_ttft_result()["rows"])
    assert [title.split(" · ")[0] for title in page.selectbox(key="other-file").options] == ["nothing", "two.json"]
    page.selectbox(key="other-file").select_index(1).run()
    assert num_charts(page) == 6
    page.selectbox(key="result-file").select(by_name["run.json"]).run()
    assert num_charts(page) == 2
    assert not [box for box in page.selectbox if box.key == "other-file"], "there is no other eval"


def test_the_page_opens_on_quality_or_time_to_first_token(open_page: Open, tmp_path: Path) -> None:
    soak = (Path(__file__).resolve().parents[2] / "docs" / "results" / "soak-town.json").read_text()
    (tmp_path / "shipped").mkdir()
    ttft, quality = json.dumps(small_ttft_result()), json.dumps(small_eval_result())
    for name, text in (("a-soak", soak), ("b-ttft", ttft), ("c-eval", quality)):
        (tmp_path / "shipped" / f"{name}.json").write_text(text)
    page = open_page(newest=soak)
    assert page.selectbox(key="result-file").value == "docs/c-eval.json"
    page = open_page(own=ttft, newest=soak)
    assert page.selectbox(key="result-file").value == "own.json"
    assert len(page.selectbox(key="result-file").options) == 5


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


def reloaded(**params: str) -> AppTest:
    page = AppTest.from_file(str(APP), default_timeout=60).run().switch_page("views/quality.py")
    for name, value in params.items():
        page.query_params[name.replace("_", "-")] = value
    page.run()
    assert not page.exception, page.exception
    return page


def address(page: AppTest) -> dict[str, str]:
    told = {name: page.query_params[name] for name in ("result-file", "other-file", "metric", "kind", "subset")}
    return {name: value if isinstance(value, str) else value[0] for name, value in told.items()}


def test_a_reload_keeps_the_files_and_what_is_shown_of_them(open_page: Open) -> None:
    page = open_page(**{name: json.dumps(small_eval_result()) for name in ("one", "two", "three")})
    for key, name in (("result-file", "two.json"), ("other-file", "one.json")):
        box = page.selectbox(key=key)
        box.select(next(title for title in box.options if title.startswith(name))).run()
    page.button_group(key="kind").set_value("across").run()
    page.button_group(key="metric").set_value("kl_along_answer").run()
    page.button_group(key="subset").set_value("answered").run()
    again = reloaded(**address(page))
    assert address(again) == address(page)
    assert (again.selectbox(key="result-file").value, again.selectbox(key="other-file").value) == (
        "two.json",
        "one.json",
    )
    assert [again.button_group(key=key).value for key in ("metric", "kind", "subset")] == [
        "kl_along_answer",
        "across",
        "answered",
    ]
    assert not any("address" in warning.value for warning in again.warning)


def test_an_address_that_names_what_is_gone_says_so(open_page: Open) -> None:
    open_page(**{name: json.dumps(small_eval_result()) for name in ("one", "two")})
    page = reloaded(result_file="../*gone*.json", metric="beauty", kind="<b>")
    (told,) = [warning.value for warning in page.warning if "address" in warning.value]
    assert r"names \.\./\*gone\*\.json, which isn't here" in told
    assert "Metric: the page's address names beauty" in told
    assert len(page.dataframe) >= 1, "the newest file is shown"
    page.selectbox(key="result-file").select_index(1).run()
    assert not any("gone" in warning.value for warning in page.warning)
    again = reloaded(result_file="opened-here")
    assert any("has to be opened again" in warning.value for warning in again.warning)


def test_the_address_changes_once_a_run_at_most(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change is an entry in the browser's history, through which Back goes one by one."""
    sent: list[dict[str, str]] = []
    send = QueryParams._send_query_param_msg

    def count(params: QueryParams) -> None:
        sent.append(params.to_dict())
        send(params)

    monkeypatch.setattr(QueryParams, "_send_query_param_msg", count)
    page = open_page(**{name: json.dumps(small_eval_result()) for name in ("one", "two")})
    (arena, quality) = sent
    assert "chat" in arena
    assert {"result-file", "other-file", "metric", "kind", "subset"} <= quality.keys()
    page.run()
    assert len(sent) == 2, "nothing was chosen"
    page.button_group(key="kind").set_value("across").run()
    assert len(sent) == 3
    assert address(page)["kind"] == "across"
