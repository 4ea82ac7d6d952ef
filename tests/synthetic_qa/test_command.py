from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner, Result

from kvarena.documents import load_chunks, load_system_prompt
from kvarena.synthetic_qa.command import worlds
from kvarena.synthetic_qa.questions import SYSTEM_PROMPT

app = typer.Typer()
app.command()(worlds)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_folder_is_one_that_the_rest_reads(tmp_path: Path) -> None:
    result = run("--output", tmp_path / "town", "--num-chunks", 9, "--num-questions", 40)
    assert result.exit_code == 0, result.output
    chunks = load_chunks(tmp_path / "town")
    assert len(chunks) == 9
    assert load_system_prompt(tmp_path / "town") == SYSTEM_PROMPT
    records = [json.loads(line) for line in (tmp_path / "town" / "questions.jsonl").read_text().splitlines()]
    assert len(records) == 40
    names = {chunk.name: chunk.text for chunk in chunks}
    for record in records:
        assert set(record["needs"]) <= set(record["chunks"]) <= set(names)
        assert [name for name in record["chunks"] if name in record["needs"]] == record["needs"]
        if record["kind"] != "unanswerable":
            assert any(record["answers"][0] in names[name] for name in record["needs"])


def test_equal_seeds_write_equal_files(tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("--output", tmp_path / folder, "--seed", seed).exit_code == 0

    def files(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}

    assert files("a") == files("b")
    assert files("a") != files("c")


def test_a_folder_with_files_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = run("--output", tmp_path)
    assert result.exit_code == 2
    assert "--force" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert run("--output", tmp_path, "--force").exit_code == 0


def test_a_context_larger_than_the_town_is_refused(tmp_path: Path) -> None:
    result = run("--output", tmp_path / "town", "--num-chunks", 4, "--context-chunks", 5)
    assert result.exit_code == 2
    assert "5 chunks of a town that has 4" in result.output


def test_a_town_with_little_to_ask_says_so(tmp_path: Path) -> None:
    result = run("--output", tmp_path / "town", "--num-chunks", 2, "--chunk-tokens", 20, "--num-questions", 900)
    assert result.exit_code == 0
    assert "no more to ask" in result.output


def test_links_are_chosen_by_name(tmp_path: Path) -> None:
    result = run("--output", tmp_path / "days", "--links", "day, person")
    assert result.exit_code == 0, result.output
    details = {json.loads(line)["detail"] for line in (tmp_path / "days" / "questions.jsonl").read_text().splitlines()}
    assert {"same_day", "same_person"} <= details
    assert not details & {"same_shop", "same_street", "nickname"}
    refused = run("--output", tmp_path / "none", "--links", "cousin")
    assert refused.exit_code == 2
    assert "cousin; choose of person" in refused.output
