"""Question files: what they may leave out, and what is said of those that can't be used."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from kvarena.bench.quality.questions import Redraw, load_questions
from kvarena.synthetic_qa.questions import write_folder, write_questions
from kvarena.synthetic_qa.town import TownShape, write_town
from support.question_folder import write_question_folder

PLAIN = {"question": "What grows?", "answers": ["tea"]}


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    question_set = load_questions(write_question_folder(tmp_path, [PLAIN]))
    (question,) = question_set.questions
    assert [chunk.name for chunk in question.chunks] == ["1-tea", "2-rain", "10-road"]
    assert (question.kind, question.detail, question.history) == ("question", "", ())
    assert question_set.system == "Read."
    assert question.messages(question_set.system, "#") == [
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
    question_set = load_questions(write_question_folder(tmp_path, [record, PLAIN | {"answers": "tea"}]))
    first, second = question_set.questions
    assert first.messages("", "|") == [
        {"role": "user", "content": "|Rain falls at seven.|Tea grows on the hill.|When does rain fall?"},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "What grows?"},
    ]
    assert second.answers == ("tea",)
    assert question_set.kinds == ["followup", "question"]
    assert len(question_set.chunks) == 3


def test_questions_elsewhere_and_a_limit(tmp_path: Path) -> None:
    records = [PLAIN | {"question": f"Question {number}?"} for number in range(10)]
    path = write_question_folder(tmp_path / "town", records).rename(tmp_path / "asked.jsonl")
    asked = [question.question for question in load_questions(path, tmp_path / "town", limit=5).questions]
    assert len(set(asked)) == 5
    assert asked == sorted(asked)
    assert load_questions(path, tmp_path / "town", limit=20) == load_questions(path, tmp_path / "town")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt, \.md or \.pdf files"):
        load_questions(path, tmp_path / "empty")


def test_a_file_that_cannot_be_used_matters_to_questions_that_need_it_alone(tmp_path: Path) -> None:
    path = write_question_folder(tmp_path, [PLAIN])
    chunk = "1-tea"
    (tmp_path / "bad.txt").write_bytes(b"")
    assert [str(problem) for problem in load_questions(path).problems] == ["bad.txt: empty"]
    write_question_folder(tmp_path, [PLAIN | {"chunks": [chunk, "bad"]}])
    with pytest.raises(ValueError, match=r"line 1: there is no chunk 'bad': bad\.txt: empty"):
        load_questions(path)
    (tmp_path / f"{chunk}.md").write_text("Another.")
    write_question_folder(tmp_path, [PLAIN | {"chunks": [chunk]}])
    with pytest.raises(ValueError, match=rf"there is no chunk '{chunk}'; the folder has {chunk}\.md, {chunk}\.txt"):
        load_questions(path)


def test_a_made_up_town_can_be_asked(tmp_path: Path) -> None:
    rng = random.Random(3)
    town = write_town(rng, TownShape(8, 60))
    items = write_questions(town, rng, 40, 5)
    write_folder(tmp_path, town, items)
    question_set = load_questions(tmp_path / "questions.jsonl")
    assert [question.question for question in question_set.questions] == [item.question.question for item in items]
    assert [question.history for question in question_set.questions] == [item.question.history for item in items]
    assert [question.answers for question in question_set.questions] == [(item.question.answer,) for item in items]
    assert {len(question.chunks) for question in question_set.questions} == {5}


def test_a_seed_draws_other_contexts_and_keeps_what_a_question_needs_in_its_order(tmp_path: Path) -> None:
    record = PLAIN | {"needs": ["5", "2"], "chunks": ["5", "1", "2", "3"]}
    records = [record | {"question": f"What grows, {number}?"} for number in range(20)]
    path = write_question_folder(tmp_path, [*records, PLAIN | {"needs": [], "chunks": ["7"]}])
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"Chunk {number}.")

    def contexts(*redraw: int | None) -> list[list[str]]:
        question_set = load_questions(path, redraw=Redraw(*redraw) if redraw else None)  # type: ignore[arg-type]
        return [[chunk.name for chunk in question.chunks] for question in question_set.questions]

    assert contexts() == [["5", "1", "2", "3"]] * 20 + [["7"]]
    drawn = contexts(1)
    assert drawn == contexts(1) != contexts(2)
    assert [len(set(names)) for names in drawn] == [4] * 20 + [1]
    assert all(names.index("5") < names.index("2") for names in drawn[:-1])
    assert {names.index("5") for names in drawn[:-1]} == {0, 1, 2}, "places are drawn too"
    assert {name for names in drawn for name in names} > {"0", "8", "1-tea"}
    assert {len(names) for names in contexts(1, 6)} == {6}
    assert {len(names) for names in contexts(1, 1)} == {1, 2}, "never without what it needs"
    assert {len(names) for names in contexts(1, 99)} == {12}, "the folder has no more"
    path.write_text(path.read_text().split("\n", 1)[1])
    assert contexts(1) == drawn[1:], "a question's context is its own, whatever else is asked"


def test_no_other_context_without_knowing_what_a_question_needs(tmp_path: Path) -> None:
    path = write_question_folder(tmp_path, [PLAIN])
    with pytest.raises(ValueError, match="line 1: without needs"):
        load_questions(path, redraw=Redraw(1))
    path = write_question_folder(tmp_path, [PLAIN | {"needs": ["9"]}])
    with pytest.raises(ValueError, match="needs has '9', which is not among its chunks: 1-tea"):
        load_questions(path, redraw=Redraw(1))


def test_a_question_may_have_no_gold_answer(tmp_path: Path) -> None:
    (question,) = load_questions(write_question_folder(tmp_path, [PLAIN | {"answers": []}])).questions
    assert question.answers == ()
    assert question.messages("", " # ")[-1]["content"].endswith(question.question)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": " "}, "question must be a text"),
        ({"answers": None}, "answers must be a list of texts"),
        ({"answers": [7]}, "answers must be a list of texts"),
        ({"chunks": "1-tea"}, "chunks must be a list of texts"),
        ({"chunks": ["3-snow"]}, "no chunk '3-snow'; the folder has 1-tea, 2-rain"),
        ({"history": [{"question": "?"}]}, "history must be a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write_question_folder(tmp_path, [PLAIN, PLAIN | change])
    with pytest.raises(ValueError, match=said) as caught:
        load_questions(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


@pytest.mark.parametrize(("text", "said"), [("", "has no questions"), ("{", "line 1"), ("[1]\n", "JSON object")])
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = write_question_folder(tmp_path, [])
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        load_questions(path)
    with pytest.raises(ValueError, match="can't be read"):
        load_questions(tmp_path / "missing.jsonl", tmp_path)
