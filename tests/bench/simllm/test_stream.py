"""What a stream of tasks is made of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from kvarena.bench.quality.questions import EvalQuestion, QuestionSet, load_questions
from kvarena.bench.simllm.running import StreamTask, make_stream
from kvarena.home import project_root
from support.question_folder import write_question_folder


@pytest.fixture(scope="module")
def question_set() -> QuestionSet:
    return load_questions(project_root() / "backend/models/town/notes" / "questions.jsonl")


def names(question: EvalQuestion) -> list[str]:
    return [chunk.name for chunk in question.chunks]


def similar(stream: list[StreamTask]) -> list[StreamTask]:
    return [task for task in stream if task.earlier is not None]


def test_half_of_the_tasks_are_the_shipped_questions_each_once(question_set: QuestionSet) -> None:
    stream = make_stream(question_set, 2 * len(question_set.questions), 0.5)
    assert len(similar(stream)) == len(question_set.questions)
    assert {task.question for task in similar(stream)} == set(question_set.questions)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_similar_task_has_an_earlier_new_ones_chunks(question_set: QuestionSet, ratio: float) -> None:
    stream = make_stream(question_set, 40, ratio, seed=3)
    assert len(stream) == 40
    assert len(similar(stream)) == min(round(40 * ratio), 39)
    for place, task in enumerate(stream):
        if task.earlier is None:
            assert task.kind == "new"
            continue
        source = stream[task.earlier]
        assert task.earlier < place
        assert source.kind == "new"
        assert source.question != task.question
        assert (names(source.question) == names(task.question)) == (task.kind == "same context")
        assert sorted(names(source.question)) == sorted(names(task.question))
    if 0 < ratio < 1:
        assert {task.kind for task in stream} == {"new", "same context", "other order"}


def test_new_tasks_share_no_set_of_chunks(question_set: QuestionSet) -> None:
    contexts = [frozenset(task.question.chunks) for task in make_stream(question_set, 60, 0.5) if task.earlier is None]
    assert len(set(contexts)) == len(contexts) == 30


def test_gold_answers_hold(question_set: QuestionSet) -> None:
    """What a question needs, and what stood in between, stands in the task's context as in the exam."""
    as_shipped = {(question.question, question.answers): question for question in question_set.questions}
    for task in make_stream(question_set, 240, 0.5) + make_stream(question_set, 100, 0.9, seed=1):
        shipped = as_shipped[task.question.question, task.question.answers]
        own = names(shipped)
        needed = [own.index(name) for name in shipped.needs] or [0, len(own) - 1]
        stretch = "|".join(own[min(needed) : max(needed) + 1])
        assert stretch in "|".join(names(task.question))


def test_equal_seeds_make_equal_streams(question_set: QuestionSet) -> None:
    assert make_stream(question_set, 30, 0.5, seed=1) == make_stream(question_set, 30, 0.5, seed=1)
    for one, other in pairwise(make_stream(question_set, 30, 0.5, seed=seed) for seed in range(3)):
        assert one != other


def test_an_exam_of_a_single_question(tmp_path: Path) -> None:
    question_set = load_questions(write_question_folder(tmp_path, [{"question": "tea?", "answers": ["tea"]}]))
    assert [task.question for task in make_stream(question_set, 4, 0.5)] == list(question_set.questions) * 4


@pytest.mark.parametrize(("num_tasks", "ratio", "message"), [(0, 0.5, "not 0"), (4, 1.5, "from 0 to 1, not 1.5")])
def test_what_is_no_stream(question_set: QuestionSet, num_tasks: int, ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream(question_set, num_tasks, ratio)


def test_needs_are_read_and_checked(tmp_path: Path) -> None:
    record = {"question": "tea?", "answers": ["tea"], "chunks": ["1-tea", "10-road"]}
    assert load_questions(write_question_folder(tmp_path, [record | {"needs": ["1-tea"]}])).questions[0].needs == (
        "1-tea",
    )
    with pytest.raises(ValueError, match=r"line 1: needs has '2-rain', which is not among its chunks: 1-tea, 10-road"):
        load_questions(write_question_folder(tmp_path, [record | {"needs": ["2-rain"]}]))
