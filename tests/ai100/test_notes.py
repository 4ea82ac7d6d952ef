"""Which notes a topic and its turns get, and that terminal, HTTP and page get the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ai100.chat import ChatSession
from ai100.notes import MAX_NOTE_CHARACTERS, Note, Notes, load_notes, passages
from ai100.runtimes.runtime import StaticShapes
from ai100.settings import EngineSettings, open_engine
from ai100.topics import KeywordTopics, load_topics
from kvarena.contenders.ai100 import AI100Settings
from kvarena.engines.base import Sampling
from support.ai100_engine import AI100, SEED, SEED_TOPICS, Answer, read
from support.real_model import real_model_folder

Make = Callable[..., AI100]
FILES = {
    "kohli-1-life": "Virat Kohli: life\n\nVirat Kohli was born in Delhi.\n\nKohli is an Indian cricketer.",
    "kohli-2-records": "Virat Kohli: records\n\nHe has scored 82 centuries.\n\nHis highest score is 254, in Pune.",
    "potter-1-author": "The author of Harry Potter\n\nJ. K. Rowling wrote Harry Potter.",
    "potter-2-books": "The Harry Potter books\n\nThe last book is about the Horcruxes.\n\nThe first has a stone.",
    "mars-1": "Mars\n\nMars has two moons.",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "sys_prompt.txt").write_text("Be brief.")
    return tmp_path


@pytest.fixture
def notes(folder: Path, ai100: AI100) -> Notes:
    return load_notes(folder, ai100.runtime.tokenizer, 100, " # ")


def names(chosen: tuple[Note, ...]) -> list[str]:
    return [note.name for note in chosen]


def test_a_topic_gets_the_notes_nearest_to_its_first_message(notes: Notes) -> None:
    assert names(notes.of_topic("Who wrote Harry Potter?"))[0] == "potter-1-author"
    assert set(names(notes.of_topic(SEED[0]))) == {"kohli-1-life"}, "what names him twice, in so small a budget"
    assert names(notes.of_topic("How many moons has Mars?")) == ["mars-1"]
    assert notes.of_topic("Hello!") == notes.of_topic("How do I bake bread?") == ()


def test_the_budget_bounds_them(folder: Path, ai100: AI100) -> None:
    for budget in (0, 20, 60):
        notes = load_notes(folder, ai100.runtime.tokenizer, budget, " # ")
        assert sum(note.num_tokens for note in notes.of_topic(SEED[0])) <= budget
    with pytest.raises(ValueError, match="notes_tokens must be at least 0, not -1"):
        Notes(budget=-1)


def test_a_file_that_is_not_utf_8_takes_no_others_down(folder: Path, ai100: AI100, notes: Notes) -> None:
    (folder / "bad.txt").write_text("Über den Fluss", encoding="latin-1")
    assert load_notes(folder, ai100.runtime.tokenizer, 100, " # ").notes == notes.notes


def test_a_turn_gets_what_its_topic_lacks_and_once(notes: Notes) -> None:
    begun = notes.of_topic(SEED[0])[:1]
    asked = [SEED[0], SEED[1], "And why?", SEED[1] + "!"]
    first, second, vague, again = notes.of_turns(begun, SEED[0], asked)
    assert first == vague == again == ()
    assert "82 centuries" in second[0].text


def test_a_document_is_cut_at_paragraphs_and_long_ones_between_sentences() -> None:
    assert passages("A title\n\nOne.\n\nTwo.\n") == ["A title\nOne.", "A title\nTwo."]
    assert passages("Only a paragraph.") == ["Only a paragraph."]
    pieces = passages(f"Title\n\n{'A sentence of some length stands here. ' * 60}")
    assert len(pieces) > 2
    assert all(len(piece) <= MAX_NOTE_CHARACTERS + len("Title\n") and piece.endswith(".") for piece in pieces)
    assert Note("handbook-03-travel", "", 1).series == "handbook"
    assert (Note("travel_policy", "", 1).series, Note("17-thea", "", 1).series) == ("travel policy", "")


def ask(ai100: AI100, *messages: tuple[str, str], conversation: str | None = None, **options: Any) -> Answer:
    return read(
        ai100.start([{"role": role, "content": text} for role, text in messages], conversation, **options), ai100.engine
    )


def prompt(ai100: AI100, answer: Answer) -> str:
    return ai100.engine.tokenizer.decode(answer.prompt_ids)


def test_who_gets_notes(make: Make, notes: Notes) -> None:
    """A client that brings neither a system message nor chunks, or asks for them."""
    ai100 = make(notes=notes)
    bare = ask(ai100, ("user", "How many moons has Mars?"))
    assert prompt(ai100, bare).startswith("<s>system: Be brief. # Mars\nMars has two moons. # \nuser: How many")
    assert bare.details["notes"] == "mars-1"
    system = ("system", "Rhyme.")
    for answer in (
        ask(ai100, system, ("user", "How many moons has Mars?")),
        ask(ai100, ("user", " # Mars is red. # How many moons has Mars?")),
        ask(ai100, ("user", "How many moons has Mars?"), notes=False),
    ):
        assert "two moons" not in prompt(ai100, answer)
        assert answer.details["notes"] == ""
    wanted = ask(ai100, system, ("user", "How many moons has Mars?"), notes=True)
    assert prompt(ai100, wanted).startswith("<s>system: Rhyme. # Mars\nMars has two moons. # \nuser: ")


def test_chunks_that_a_client_brings_dont_tell_the_topic(make: Make, notes: Notes) -> None:
    ai100 = make(notes=notes, topics=KeywordTopics(load_topics()))
    asked = " # Salt and flour make bread in the oven. # Who wrote Harry Potter?"
    assert ask(ai100, ("user", asked)).details["topic"] == "books"


def test_by_name_by_history_and_without_slots_the_prompt_is_the_same(make: Make, notes: Notes) -> None:
    topics = KeywordTopics(load_topics(), notes=notes)
    by_name, by_history, uncached = (make(notes=notes, topics=topics, use_cache=on) for on in (True, True, False))
    for question in SEED:
        named = by_name.ask(question)
        assert named.prompt_ids == by_history.chat(question, "c").prompt_ids == uncached.ask(question).prompt_ids
        assert named.token_ids == by_name.generate(named.prompt_ids)
    fresh = make(notes=notes, topics=topics)
    *history, _ = by_history.histories["c"]
    later = read(fresh.start(history, None), fresh.engine)
    for key in ("topic", "turn", "notes"):
        assert later.details[key] == named.details[key], "also of a server that was started since"


def test_a_question_without_room_for_notes_is_asked_without_them(make: Make, notes: Notes) -> None:
    shapes = StaticShapes(prefill_seq_len=16, ctx_len=96, full_batch_size=1, kv_cache_batch_size=2)
    ai100 = make(shapes=shapes, notes=notes)
    answer = ask(ai100, ("user", "How many moons has Mars? " + "rain " * 30))
    assert answer.details["notes"] == ""


def test_notes_are_no_reason_to_reset_a_topic(make: Make, notes: Notes) -> None:
    ai100 = make(notes=notes, topics=KeywordTopics(load_topics(), notes=notes), max_context=60)
    ai100.ask(SEED[0], sampling=Sampling(max_tokens=2, temperature=0.0))
    following = ai100.ask(SEED[1], sampling=Sampling(max_tokens=2, temperature=0.0))
    assert following.details["status"] == "INCREMENTAL_PREFILL"


def test_the_seed_conversation_in_short_slots(folder: Path) -> None:
    """Two topics in two slots, each with its own notes; the town model has no idea of either, but the slots do."""
    own = AI100Settings("host", full_batch_size=1, kv_cache_batch_size=4, ctx_len=2048, gen_len=8)
    engine = open_engine(EngineSettings(own, "town", data=folder))
    chat = ChatSession(engine)
    told = [chat.ask(question).details for question in SEED]
    engine.close()
    assert [turn["topic"] for turn in told] == SEED_TOPICS
    assert [turn["slot"] for turn in told] == [0, 0, 1, 1, 0]
    assert [turn["status"][:3] for turn in told] == ["NEW", "INC", "NEW", "INC", "INC"]
    assert all(turn["num_prefilled_tokens"] < 300 for turn in told)
    assert all("potter" not in told[at]["notes"] and "kohli" in told[at]["notes"] for at in (0, 1, 4))
    assert all("kohli" not in told[at]["notes"] and "potter" in told[at]["notes"] for at in (2, 3))


@pytest.mark.slow
def test_the_seed_conversation_over_the_real_model_and_its_documents() -> None:
    own = AI100Settings("host", full_batch_size=1, kv_cache_batch_size=4, ctx_len=2048, gen_len=60)
    engine = open_engine(EngineSettings(own, str(real_model_folder())))
    chat = ChatSession(engine)
    replies = [chat.ask(question) for question in SEED]
    engine.close()
    assert [reply.details["topic"] for reply in replies] == SEED_TOPICS
    assert [reply.details["slot"] for reply in replies] == [0, 0, 1, 1, 0]
    assert all(reply.details["num_prefilled_tokens"] < 500 for reply in replies)
    assert "Rowling" in replies[2].text
