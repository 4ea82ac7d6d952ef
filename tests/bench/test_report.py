"""`kvarena report`: the page of the project's own result files and of made-up ones, read back as HTML."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvarena.bench.report import read_files, render
from kvarena.cli import app
from kvarena.home import project_root
from support.html_page import HTMLPage
from support.small_eval_result import small_eval_result
from support.small_ttft_result import SETUPS, small_ttft_result

SCRIPT = "<script>alert('x')</script>"


def write(path: Path, result: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return str(path)


def page_of(*results: str) -> HTMLPage:
    return HTMLPage.parse(render(read_files(results)))


def shipped_files() -> list[Path]:
    """The smallest file of each benchmark under `docs/results`."""
    smallest: dict[str, Path] = {}
    files = (project_root() / "docs" / "results").glob("*.json")
    for path in sorted(files, key=lambda path: -path.stat().st_size):
        smallest[json.loads(path.read_text())["settings"]["benchmark"]] = path
    return list(smallest.values())


@cache
def shipped_page() -> HTMLPage:
    return page_of(*map(str, shipped_files()))


@pytest.fixture(scope="module")
def ttft_page(tmp_path_factory: pytest.TempPathFactory) -> HTMLPage:
    folder = tmp_path_factory.mktemp("results")
    ttft = small_ttft_result()
    hostile = ttft["rows"][-1] | {"contender": SCRIPT, "policy": None, "ratio": None, "check_layer": None}
    ttft["rows"].append(hostile)
    ttft["settings"][SCRIPT] = {"note": SCRIPT}
    return page_of(write(folder / "<i>ttft.json", ttft), write(folder / "eval.json", small_eval_result()))


def test_each_file_has_its_sections() -> None:
    files = {path.name for path in shipped_files()}
    assert len(files) >= 8
    page = shipped_page()
    assert {"quality", "others", "settings"} <= set(page.sections)
    assert {Path(name.split()[0]).name for name in page.sections["settings"].headings} == files
    for table in ("Settings", "Versions", "Machine"):
        assert table in page.sections["settings"].captions


def test_all_that_was_measured_is_drawn(ttft_page: HTMLPage) -> None:
    assert list(ttft_page.sections) == ["ttft", "quality", "time-split", "throughput", "settings"]
    titles = {anchor: section.figures for anchor, section in ttft_page.sections.items()}
    assert [title.split(" against ")[0] for title in titles["ttft"][:4]] == [
        "Time to first token",
        "Speedup over plain",
    ] * 2
    assert "8 requests at once" in titles["ttft"][4]
    assert len(titles["quality"]) == 4 * (3 + 1) + 1, "metrics, kinds and the questions answered right; and time"
    assert titles["time-split"][0].startswith("Time split at 512 tokens, warm store")
    assert len(titles["time-split"]) == 2 * 2 + 1
    assert titles["throughput"] == [
        "Throughput at 2,000 tokens, warm store, 8 requests at once; times plain's at the end"
    ]


def test_figures_have_texts_for_those_who_cannot_see_them(ttft_page: HTMLPage) -> None:
    figures = [title for section in ttft_page.sections.values() for title in section.figures]
    assert ttft_page.labels_of("svg") == figures
    assert [tag for tag in ttft_page.tags if tag == "figcaption"] == ["figcaption"] * len(figures)


@pytest.mark.parametrize("which", ["shipped", "ttft"])
def test_nothing_is_loaded_from_elsewhere(which: str, ttft_page: HTMLPage) -> None:
    page = ttft_page if which == "ttft" else shipped_page()
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(page.tags)
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert {name for name in page.ids if page.ids.count(name) > 1} <= page.drawing_ids


def test_names_from_files_stay_text(ttft_page: HTMLPage) -> None:
    assert not {"script", "i"} & set(ttft_page.tags)
    assert f"{SCRIPT} note" in ttft_page.text
    assert ttft_page.text.count(SCRIPT) >= 6  # settings, their Markdown, tables, figures
    assert any("<i>ttft.json" in heading for heading in ttft_page.sections["ttft"].headings)


def test_tables_equal_the_rows(ttft_page: HTMLPage) -> None:
    ttft = small_ttft_result()
    columns, *lines = ttft_page.tables["Time to first token, and what it took"]
    assert len(lines) == len(ttft["rows"]) + 1
    for line, row in zip(lines, ttft["rows"], strict=False):
        shown = dict(zip(columns, line, strict=True))
        assert shown["contender"] == row["contender"]
        assert shown["policy"] == (row["policy"] or "")
        for key in ("context_tokens", "peak_rss_bytes", "requests_per_s", "reused_ratio"):
            assert shown[key] == str(row[key])
        for key, ends in {"ttft_ms": ("median", "p95"), "speedup_vs_plain": ("median", "low", "high")}.items():
            assert [shown[f"{key} {end}"] for end in ends] == [str(row[key][end]) for end in ends]
    columns, *lines = ttft_page.tables["Milliseconds by stage, medians"]
    stages = dict(zip(columns, lines[2], strict=True))
    assert {name: stages[f"stages_ms {name}"] for name in ttft["rows"][2]["stages_ms"]} == {
        name: str(ms) for name, ms in ttft["rows"][2]["stages_ms"].items()
    }


def test_the_markdown_beside_a_table_equals_it(ttft_page: HTMLPage) -> None:
    assert len(ttft_page.markdown) == len(ttft_page.tables)
    for table, markdown in zip(ttft_page.tables.values(), ttft_page.markdown, strict=True):
        lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in markdown.strip().splitlines()]
        assert set(lines.pop(1)) == {"---"}
        assert len(lines) == len(table)
        assert lines[0] == table[0]
        assert lines[-1][0] == table[-1][0]


def test_two_machines_stay_apart(tmp_path: Path) -> None:
    for name, cpu in (("a/ttft.json", "Old one"), ("b/ttft.json", "New one")):
        result = small_ttft_result(cpu)
        write(tmp_path / name, result | {"rows": result["rows"][-1:]})
    page = page_of(str(tmp_path / "a"), str(tmp_path / "b"))
    for section in page.sections.values():
        assert [heading.split(" ", 1)[0] for heading in section.headings] == [
            f"{tmp_path}/{one}/ttft.json" for one in "ab"
        ]
        assert "Old one" in section.headings[0]
        assert "New one" in section.headings[1]
        assert section.figures[: len(section.figures) // 2] == section.figures[len(section.figures) // 2 :]


def test_an_unknown_benchmark_has_its_settings_and_rows(tmp_path: Path) -> None:
    rows = [{"size": 1, "time_ms": {"median": 2.5}}, {"size": 2, "is_odd": False}]
    page = page_of(write(tmp_path / "x.json", {"settings": {"benchmark": "new"}, "rows": rows}))
    assert list(page.sections) == ["others", "settings"]
    assert page.tables["Rows"] == [["size", "time_ms median", "is_odd"], ["1", "2.5", ""], ["2", "", "False"]]
    assert page.sections["others"].figures == []


def test_a_run_without_rows_has_its_settings_only(tmp_path: Path) -> None:
    for benchmark in ("ttft", "eval", "prefix", "simllm", "ai100", "tasks"):
        result = {"settings": {"benchmark": benchmark, "is_interrupted": True}, "rows": []}
        assert list(page_of(write(tmp_path / "x.json", result)).sections) == ["settings"]


def test_the_command_writes_the_page_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.json", "two.json"):
        write(tmp_path / "results" / name, {"rows": [{"size": 1}]})
    done = CliRunner().invoke(app, ["report"])
    assert done.exit_code == 0, done.output
    assert "The report of 2 result files is in results/report.html." in done.output
    sections = HTMLPage.parse((tmp_path / "results" / "report.html").read_text()).sections
    assert [heading.strip() for heading in sections["others"].headings] == ["results/one.json", "results/two.json"]
    done = CliRunner().invoke(app, ["report", "results/t*.json", "results/two.json", "--output", "new/x.html"])
    assert done.exit_code == 0, done.output
    assert "The report of 1 result file is in new/x.html." in done.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read as a result file"),
        ("[1]", "has no list of rows"),
        ('{"rows": {}}', "has no list of rows"),
        ('{"rows": [1]}', "a row isn't an object"),
        ('{"rows": [], "settings": [1]}', "settings isn't an object"),
        (
            '{"rows": [{}], "settings": {"benchmark": "ttft"}}',
            "other rows than the benchmark ttft writes: no 'ttft_ms'",
        ),
        ('{"rows": [{"kind": "all"}], "settings": {"benchmark": "eval"}}', "other rows than the benchmark eval writes"),
        ('{"rows": [{}], "settings": {"benchmark": "ai100"}}', "other rows than the benchmark ai100 writes"),
    ],
)
def test_what_is_no_result_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "good.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "bad.json").write_text(content)
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(tmp_path / "x.html")])
    assert done.exit_code == 1
    assert f"{tmp_path / 'bad.json'} " in done.output
    assert message in done.output
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("given", ["nothing.json", ".", "[a-c]*.json"])
def test_no_files_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", given])
    assert done.exit_code == 1
    assert f"no result files at {given};" in done.output


def test_every_setup_is_in_the_legend(ttft_page: HTMLPage) -> None:
    for contender, policy, _ in SETUPS:
        assert " ".join(filter(None, (contender, policy))) in ttft_page.text
