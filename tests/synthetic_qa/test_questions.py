"""Questions on a town have the answers that its chunks give, and are asked in the chats that the page sends."""

from __future__ import annotations

import random

import pytest

from kvarena.synthetic_qa import questions as chat
from kvarena.synthetic_qa.facts import chunk_text, read_chunks
from kvarena.synthetic_qa.questions import KIND_SHARES, NOT_SAID, AnsweredQuestion, Question, Quiz, write_questions
from support.towns import small_town

SEEDS = range(12)


def questions(seed: int) -> list[Question]:
    quiz = Quiz(small_town(seed), random.Random(seed))
    return quiz.all_facts() + quiz.followups(10) + quiz.unanswerable(10)


@pytest.mark.parametrize("seed", SEEDS)
def test_gold_answers_stand_in_the_chunks_they_need(seed: int) -> None:
    texts = [chunk_text(chunk) for chunk in small_town(seed)]
    for asked in questions(seed):
        if asked.kind != "unanswerable":
            assert asked.chunks
            assert any(asked.answer in texts[place] for place in asked.chunks), asked


@pytest.mark.parametrize("seed", SEEDS)
def test_across_chunks_the_referent_stands_in_an_earlier_chunk(seed: int) -> None:
    """Left with the later chunk alone, a careful reader doesn't know."""
    town = small_town(seed)
    across = [asked for asked in questions(seed) if asked.kind == "across"]
    assert across
    for asked in across:
        earlier, later = asked.chunks
        assert earlier < later
        alone = Quiz([town[later]], random.Random(0)).all_facts()
        assert (asked.answer, asked.question) not in {(known.answer, known.question) for known in alone}
        facts = {(fact.subject.name, fact.value) for fact in read_chunks([town[later]]).facts}
        everything = read_chunks(town).facts
        known_subject = next(
            fact.subject.name for fact in everything if fact.value == asked.answer and fact.chunks == asked.chunks
        )
        assert (known_subject, asked.answer) not in facts


@pytest.mark.parametrize("seed", SEEDS)
def test_guessing_another_referent_fails(seed: int) -> None:
    """A town names several people, streets and days: the one that is meant is not the only one there."""
    town = small_town(seed)
    named = [reference for chunk in town for sentence in chunk for reference in sentence.names]
    for category in ("person", "street", "day"):
        names = {reference.name for reference in named if reference.category == category}
        assert len(names) != 1


@pytest.mark.parametrize("seed", SEEDS)
def test_unanswerable_questions_have_no_answer_in_the_notes(seed: int) -> None:
    town = small_town(seed)
    texts = [chunk_text(chunk) for chunk in town]
    facts = {(fact.subject.name, fact.relation) for fact in read_chunks(town).facts}
    unanswerable = [asked for asked in questions(seed) if asked.kind == "unanswerable"]
    assert unanswerable
    for asked in unanswerable:
        assert asked.answer == NOT_SAID
        person = next(word.strip("?") for word in asked.question.split()[1:] if word[0].isupper())
        if asked.detail == "unknown_person":
            assert not any(person in text for text in texts)
        relation = _relation_of(asked.question, person)
        assert (person, relation) not in facts


@pytest.mark.parametrize("seed", SEEDS)
def test_gold_answers_hold_in_any_order(seed: int) -> None:
    """Shuffled chunks are read anew, so nothing that was said of one person is asked of another."""
    rng = random.Random(seed)
    town = small_town(seed)
    rng.shuffle(town)
    read = {(fact.subject.name, fact.value) for fact in read_chunks(town).facts}
    for asked in Quiz(town, rng).all_facts():
        assert any(name in asked.question and value == asked.answer for name, value in read)


def test_a_followup_leaves_the_name_out() -> None:
    followups = [asked for seed in SEEDS for asked in questions(seed) if asked.kind == "followup"]
    assert len(followups) > 20
    for asked in followups:
        assert len(asked.history) == 1
        assert asked.question.startswith("And ")
        assert asked.turns[-1].answer == asked.answer


def test_an_exam_has_all_kinds_in_their_shares() -> None:
    items = write_questions(small_town(1, 16, 100), random.Random(1), 100, 7)
    assert len(items) == 100
    for kind, share in KIND_SHARES.items():
        assert abs(sum(item.question.kind == kind for item in items) - 100 * share) <= 3
    assert len({(item.question.turns[0], item.question.question) for item in items}) == 100
    for item in items:
        assert len(set(item.context)) == 7
        assert set(item.needs) <= set(item.context)
        if item.question.kind == "across":
            assert list(item.context) == sorted(item.context)


def test_an_exam_needs_enough_chunks() -> None:
    with pytest.raises(ValueError, match="1 to 8 chunks of this town, not 9"):
        write_questions(small_town(1), random.Random(1), 10, 9)


def _relation_of(question: str, person: str) -> str:
    from kvarena.synthetic_qa.facts import RELATIONS

    return next(
        relation.name
        for relation in RELATIONS.values()
        if question in {template.format(s=person) for template in relation.questions if "{o}" not in template}
    )


def test_a_chat_is_what_the_page_sends() -> None:
    assert chat.messages(
        ["Bruno keeps bees.", "Vera drinks tea."], [AnsweredQuestion("What does Vera drink?", "tea")]
    ) == [
        {"role": "system", "content": chat.SYSTEM_PROMPT},
        {"role": "user", "content": "<note>Bruno keeps bees.<note>Vera drinks tea.<note>What does Vera drink?"},
    ]


def test_a_followup_is_a_further_turn() -> None:
    town = small_town(1)
    asked = Quiz(town, random.Random(1)).followups(1)[0]
    messages = chat.messages([chunk_text(chunk) for chunk in town], asked.turns)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[-1]["content"] == asked.question
    assert messages[2]["content"] == asked.history[0].answer


def test_every_separator_comes_up() -> None:
    rng = random.Random(1)
    assert {chat.random_separator(rng) for _ in range(400)} == set(chat.SEPARATORS)
