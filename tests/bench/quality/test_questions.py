"""Question files: what they may leave out, and what is said of those that can't be used."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from exam_folder import write_exam_folder
from kvarena.bench.quality.questions import load_exam
from kvarena.worlds.exam import write_exam
from kvarena.worlds.folder import write_folder
from kvarena.worlds.town import TownShape, write_town

PLAIN = {"question": "What grows?", "answers": ["tea"]}


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    exam = load_exam(write_exam_folder(tmp_path, [PLAIN]))
    (question,) = exam.questions
    assert [chunk.name for chunk in question.chunks] == ["1-tea", "2-rain", "10-road"]
    assert (question.kind, question.detail, question.history) == ("question", "", ())
    assert exam.system == "Read."
    assert question.messages(exam.system, "#") == [
        {"role": "system", "content": "Read."},
        {"role": "user", "content": "#Tea grows on the hill.#Rain falls at seven.#A road.#What grows?"},
    ]


def test_chunks_history_and_several_answers(tmp_path: Path) -> None:
    record = PLAIN | {
        "answers": ["tea", "green tea"],
        "kind": "followup",
        "chunks": ["2-rain", "1-tea"],
        "history": [{"question": "When does rain fall?", "answer": "seven"}],
    }
    exam = load_exam(write_exam_folder(tmp_path, [record, PLAIN | {"answers": "tea"}]))
    first, second = exam.questions
    assert first.messages("", "|") == [
        {"role": "user", "content": "|Rain falls at seven.|Tea grows on the hill.|When does rain fall?"},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "What grows?"},
    ]
    assert second.answers == ("tea",)
    assert exam.kinds == ["followup", "question"]
    assert len(exam.chunks) == 3


def test_questions_elsewhere_and_a_limit(tmp_path: Path) -> None:
    records = [PLAIN | {"question": f"Question {number}?"} for number in range(10)]
    path = write_exam_folder(tmp_path / "town", records).rename(tmp_path / "asked.jsonl")
    asked = [question.question for question in load_exam(path, tmp_path / "town", limit=5).questions]
    assert len(set(asked)) == 5
    assert asked == sorted(asked)
    assert load_exam(path, tmp_path / "town", limit=20) == load_exam(path, tmp_path / "town")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt or \.md files"):
        load_exam(path, tmp_path / "empty")


def test_a_made_up_town_can_be_asked(tmp_path: Path) -> None:
    rng = random.Random(3)
    town = write_town(rng, TownShape(8, 60))
    items = write_exam(town, rng, 40, 5)
    write_folder(tmp_path, town, items)
    exam = load_exam(tmp_path / "questions.jsonl")
    assert [question.question for question in exam.questions] == [item.question.question for item in items]
    assert [question.history for question in exam.questions] == [item.question.history for item in items]
    assert [question.answers for question in exam.questions] == [(item.question.answer,) for item in items]
    assert {len(question.chunks) for question in exam.questions} == {5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": " "}, "question must be a text"),
        ({"answers": []}, "answers must be a list of texts"),
        ({"answers": [7]}, "answers must be a list of texts"),
        ({"chunks": "1-tea"}, "chunks must be a list of texts"),
        ({"chunks": ["3-snow"]}, "no chunk '3-snow'; the folder has 1-tea, 2-rain"),
        ({"history": [{"question": "?"}]}, "history must be a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write_exam_folder(tmp_path, [PLAIN, PLAIN | change])
    with pytest.raises(ValueError, match=said) as caught:
        load_exam(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


@pytest.mark.parametrize(("text", "said"), [("", "has no questions"), ("{", "line 1"), ("[1]\n", "JSON object")])
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = write_exam_folder(tmp_path, [])
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        load_exam(path)
    with pytest.raises(ValueError, match="can't be read"):
        load_exam(tmp_path / "missing.jsonl", tmp_path)
