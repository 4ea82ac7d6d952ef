"""Splitting: within the size by the tokens of the model, at the best places, nothing lost, the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.documents import load_documents
from kvarena.splitting import Splitter, find_splitter

TOWN = Path(__file__).resolve().parents[1] / "backend" / "models" / "town"
PARAGRAPHS = [f"Paragraph {number}. " + f"Word{number} and more. " * 9 for number in range(12)]


def test_the_shipped_texts_stay_whole() -> None:
    found = load_documents(TOWN / "notes", find_splitter(str(TOWN)))
    assert not found.is_split
    assert not found.problems


def test_paragraphs_stay_together() -> None:
    text = "\n\n".join(paragraph.strip() for paragraph in PARAGRAPHS)
    parts = Splitter(128).split(text)
    assert "\n\n".join(parts) == text
    assert all(part.startswith("Paragraph") for part in parts)


def test_markdown_is_cut_at_headings() -> None:
    text = "\n\n".join(f"# Heading {number}\n\n{paragraph.strip()}" for number, paragraph in enumerate(PARAGRAPHS))
    parts = Splitter(80).split(text, is_markdown=True)
    assert len(parts) == len(PARAGRAPHS)
    assert all(part.startswith("# Heading") for part in parts)


def test_a_crumb_joins_its_neighbour() -> None:
    splitter = Splitter(64)
    text = "A sentence of thirty letters. " * 8 + "\n\nEnd."
    parts = splitter.split(text)
    assert parts[-1].endswith("\n\nEnd.")
    assert all(4 < splitter.count(part) <= 64 for part in parts)


@settings(deadline=None, max_examples=50)
@given(st.text(st.sampled_from("ab. \n#é字🐝\t"), max_size=2000), st.sampled_from([64, 100]), st.booleans())
def test_nothing_is_lost_and_nothing_too_long(text: str, size: int, is_markdown: bool) -> None:
    for splitter in (Splitter(size), find_splitter(str(TOWN), size)):
        parts = splitter.split(text, is_markdown)
        assert "".join("".join(parts).split()) == "".join(text.split())
        assert all(splitter.count(part) <= size for part in parts)
        assert parts == splitter.split(text, is_markdown)


def test_the_models_tokenizer_counts() -> None:
    splitter = find_splitter(str(TOWN))
    assert not splitter.estimates
    assert splitter.count("The baker keeps a cat.") == 7  # his words and the stop
    assert Splitter().count("The baker keeps a cat.") == 6


def test_a_hub_models_tokenizer_is_found_once_it_is_there(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    assert find_splitter(str(repository)).estimates
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc\n")
    assert find_splitter(str(repository)).estimates
    folder = repository / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes((TOWN / "tokenizer.json").read_bytes())
    assert find_splitter(str(repository)).tokenizer_file == folder / "tokenizer.json"


@pytest.mark.parametrize("text", ["", "{}", "nonsense", json.dumps({"version": "1.0", "model": {"type": "Unknown"}})])
def test_without_a_tokenizer_that_can_be_read_sizes_are_estimated(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert find_splitter(str(tmp_path)) == find_splitter("") == Splitter()
