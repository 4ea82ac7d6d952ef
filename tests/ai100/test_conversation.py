"""Which tokens a turn becomes, and which conversation it belongs to: by name, by history, or a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ai100 import conversation
from ai100.conversation import MAX_HISTORIES, MAX_TOPIC_TURNS, MAX_TURNS, ConversationMemory, OpenTurn, ParsedMessages
from ai100.runtimes.runtime import StaticShapes
from ai100.topics import KeywordTopics, PastTurn
from kvarena.engines.base import GenerationRequest, Sampling
from support.ai100_engine import AI100, CHAT_TEMPLATE, LISTS, read

Make = Callable[..., AI100]


def said(ai100: AI100, token_ids: list[int]) -> str:
    return ai100.engine.tokenizer.decode(token_ids)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be old"}


def test_a_topic_sees_the_system_message_and_its_own_turns(ai100: AI100) -> None:
    messages = [SYSTEM, user("river"), assistant("tea"), user("bread"), assistant("lamp"), user("rain")]
    answer = read(ai100.start(messages, None), ai100.engine)
    assert said(ai100, answer.prompt_ids) == "<s>system: be old\nuser: river\nassistant: tea</s>user: rain\nassistant: "
    assert (answer.details["topic"], answer.details["turn"]) == ("water", 2)


def test_two_topics_have_two_slots(ai100: AI100) -> None:
    slots = [ai100.ask(question).details["slot"] for question in ("river", "bread", "rain", "tea", "And why?")]
    assert slots == [0, 1, 0, 1, 1]


def test_a_conversation_is_found_by_its_history(ai100: AI100) -> None:
    ai100.chat("river", "first")
    ai100.chat("river stone", "second")
    following = ai100.chat("rain", "first")
    assert following.details["status"] == "INCREMENTAL_PREFILL"
    assert ai100.chat("rain", "second").details["status"] == "INCREMENTAL_PREFILL"


def test_a_name_holds_under_any_history_and_without(ai100: AI100) -> None:
    first = ai100.ask("river", "n")
    messages = [user("river"), assistant(first.text), user("rain")]
    with_history = read(ai100.start(messages, "n"), ai100.engine)
    assert with_history.details["turn"] == 2
    assert with_history.details["status"] == "INCREMENTAL_PREFILL"
    assert ai100.ask("rain again", "n").details["turn"] == 3


@pytest.mark.parametrize("named", ["n", None])
def test_what_the_client_sends_is_the_truth(ai100: AI100, named: str | None) -> None:
    """An answer that was edited, cut, or asked for anew: right, and as much is reused as is the same."""
    first = read(ai100.start([user("river old paper")], named), ai100.engine)
    edited = [user("river old paper"), assistant("tea tea tea"), user("rain")]
    cut = [user("river old paper"), assistant(first.text[:3]), user("rain")]
    for messages in (edited, cut):
        answer = read(ai100.start(messages, named), ai100.engine)
        expected = f"user: river old paper\nassistant: {messages[1]['content']}</s>user: rain\nassistant: "
        assert said(ai100, answer.prompt_ids) == f"<s>{expected}"
        assert answer.token_ids == ai100.generate(answer.prompt_ids)
        if named:
            assert answer.report.num_reused_tokens >= len(first.prompt_ids) - 1
    ai100.engine.batcher.slots.check_integrity()


def test_a_branch_of_a_conversation(ai100: AI100) -> None:
    """Two follow-ups of one history: each is answered as if the other weren't."""
    first = ai100.chat("river", "x")
    history = [user("river"), assistant(first.text)]
    answers = [
        read(ai100.start([*history, user(q)], None), ai100.engine) for q in ("rain hill", "rain stone", "rain hill")
    ]
    assert answers[0].token_ids == answers[2].token_ids == ai100.generate(answers[0].prompt_ids)
    assert answers[1].token_ids == ai100.generate(answers[1].prompt_ids)
    assert answers[1].report.num_reused_tokens > len(first.prompt_ids)


def test_an_answer_drawn_in_other_tokens_than_its_text_has(ai100: AI100) -> None:
    """Random weights draw such answers all the time; the follow-up goes on from the very tokens all the same."""
    told = [ai100.ask(f"river {number}", f"c{number}") for number in range(5)]
    encode = ai100.engine.tokenizer.encode
    odd = [answer for answer in told if encode(answer.text, add_special_tokens=False) != answer.token_ids]
    assert odd
    for number, answer in enumerate(told):
        following = ai100.ask("rain", f"c{number}")
        known = answer.prompt_ids + answer.token_ids
        assert following.prompt_ids[: len(known)] == known


def test_names_under_two_salts_are_two_conversations(ai100: AI100) -> None:
    mine = ai100.ask("river", "n", salt="me")
    yours = ai100.ask("rain", "n", salt="you")
    assert (yours.details["turn"], yours.details["status"]) == (1, "NEW_TOPIC")
    assert yours.details["slot"] != mine.details["slot"]


def test_a_template_that_writes_answers_otherwise_only_costs_reuse(make: Make) -> None:
    ai100 = make()
    ai100.runtime.tokenizer.chat_template = CHAT_TEMPLATE.replace("m.content", "m.content | upper")
    ai100.ask("river old")
    following = ai100.ask("rain")
    assert following.token_ids == ai100.generate(following.prompt_ids)
    assert following.details["status"] == "INCREMENTAL_PREFILL", "the part before the answer"


def test_template_arguments_are_used_for_the_topics_own_text(ai100: AI100) -> None:
    ai100.runtime.tokenizer.chat_template += "{% if shout %}!{% endif %}"
    request = GenerationRequest(
        "r",
        "",
        Sampling(max_tokens=2, temperature=0.0),
        messages=(user("river"),),
        template_arguments={"shout": True},
        add_special_tokens=False,
    )
    assert said(ai100, read(ai100.engine.generate(request), ai100.engine).prompt_ids).endswith("assistant: !")


def test_prompts_that_are_no_chat(ai100: AI100) -> None:
    def ask(prompt: Any, name: str | None, messages: tuple[Any, ...] = ()) -> Any:
        sampling = Sampling(max_tokens=4, temperature=0.0)
        return read(
            ai100.engine.generate(GenerationRequest("r", prompt, sampling, messages=messages, conversation_id=name)),
            ai100.engine,
        )

    plain = ask("tea rain hill", None)
    assert plain.token_ids == ai100.generate(plain.prompt_ids, 4)
    ids = tuple(plain.prompt_ids)
    assert ask(ids, "n").report.num_reused_tokens == 0
    assert ask((*ids, 9), "n").report.num_reused_tokens == len(ids)
    odd = (user("river"), user("rain"))
    assert ask("river\nrain", None, odd).details["topic"] == "text", "roles out of turn: the server's own rendering"


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_message_is_refused(ai100: AI100, text: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        ai100.ask(text)
    assert all(row.topic is None for row in ai100.engine.slot_rows())


def test_samples_of_one_question(ai100: AI100) -> None:
    def sample(index: int, name: str | None) -> Any:
        request = GenerationRequest(
            f"r-{index}",
            "",
            Sampling(max_tokens=3, seed=index),
            messages=(user("river"),),
            sample=index,
            num_samples=2,
            conversation_id=name,
        )
        return read(ai100.engine.generate(request), ai100.engine)

    assert [sample(index, None).details["turn"] for index in range(2)] == [1, 1]
    with pytest.raises(ValueError, match="n is 2"):
        sample(0, "named")


def test_the_oldest_conversations_are_forgotten() -> None:
    memory = ConversationMemory(KeywordTopics(LISTS), max_conversations=2)

    def begin(question: str, name: str | None) -> str:
        exchange = ParsedMessages.of([user(question)])
        assert exchange is not None
        return memory.begin(exchange, "", name).conversation.id

    first = begin("river", "a")
    begin("river", None)
    assert begin("rain", "a") == first
    begin("bread", "b")
    assert begin("rain", "a") == first
    begin("x", "c")
    begin("y", "d")
    assert begin("rain", "a") != first


@pytest.mark.parametrize("kind", ["samples", "text"])
def test_turns_that_nobody_can_find_again_push_out_no_topic(ai100: AI100, kind: str) -> None:
    """Each took the slot of the topic that was used least recently, and was the last to go."""
    questions = ("river", "bread", "hill")
    for question in questions:
        ai100.ask(question)
    for index in range(1, 5):
        messages = (user("goat"),) if kind == "samples" else ()
        sampling = Sampling(max_tokens=3, seed=index)
        sample: dict[str, Any] = {"sample": index, "num_samples": 5} if kind == "samples" else {}
        read(ai100.engine.generate(GenerationRequest("r", "goat", sampling, messages=messages, **sample)), ai100.engine)
    assert ai100.engine.batcher.slots.num_evictions == 0
    assert [ai100.ask(question).details["status"] for question in questions] == ["INCREMENTAL_PREFILL"] * 3


class SlowTopics(KeywordTopics):
    """While the next topic is found, `meanwhile` happens: the memory is not locked then."""

    meanwhile: Callable[[], object] | None = None

    def topic_of(self, message: str, earlier: Sequence[PastTurn]) -> str:
        if happens := self.meanwhile:
            self.meanwhile = None
            happens()
        return super().topic_of(message, earlier)


def begin_alone(memory: ConversationMemory, question: str, name: str) -> OpenTurn:
    exchange = ParsedMessages.of([user(question)])
    assert exchange is not None
    return memory.begin(exchange, "", name)


def test_two_first_messages_under_one_new_name_are_one_conversation() -> None:
    """They were two, and when the second was evicted, another client's request failed with a `KeyError`."""
    topics = SlowTopics(LISTS)
    memory = ConversationMemory(topics, max_conversations=2)
    others: list[OpenTurn] = []
    topics.meanwhile = lambda: others.append(begin_alone(memory, "river", "n"))
    second = begin_alone(memory, "rain", "n")
    assert [others[0].conversation] == [second.conversation] == list(memory._conversations.values())
    assert [turn.question["content"] for turn in second.conversation.turns] == ["river", "rain"]
    assert second.earlier == (others[0].turn,)
    for name in "abc":
        begin_alone(memory, "tea", name)
    assert [conversation.name for conversation in memory._named.values()] == [("", "b"), ("", "c")]


def test_a_conversation_that_is_evicted_while_a_topic_is_found_is_found_by_its_name_again() -> None:
    topics = SlowTopics(LISTS)
    memory = ConversationMemory(topics, max_conversations=1)
    first = begin_alone(memory, "river", "n").conversation
    topics.meanwhile = lambda: begin_alone(memory, "bread", "other")
    assert begin_alone(memory, "rain", "n").conversation is first
    assert list(memory._named) == [("", "n")]


def test_a_first_message_whose_topic_is_not_found_leaves_no_conversation() -> None:
    topics = SlowTopics(LISTS)
    memory = ConversationMemory(topics)

    def fail() -> None:
        raise RuntimeError("the embedding model is gone")

    topics.meanwhile = fail
    with pytest.raises(RuntimeError, match="gone"):
        begin_alone(memory, "river", "n")
    assert not memory._conversations
    assert not memory._named


class NotedTopics(KeywordTopics):
    """Notes how many turns each message is told by, and whether others can use the memory meanwhile."""

    def __init__(self) -> None:
        super().__init__({})
        self.nums_earlier: list[int] = []
        self.memory = ConversationMemory(self)
        self.was_locked = False

    def topic_of(self, message: str, earlier: Sequence[PastTurn]) -> str:
        self.nums_earlier.append(len(earlier))
        self.was_locked = self.was_locked or self.memory._lock.locked()
        return message


def test_a_long_history_that_nobody_remembers_stops_nobody() -> None:
    """Each turn was told by all before it, topic by topic, while no answer could end: minutes for 2,000 turns."""
    topics = NotedTopics()
    past = [message for number in range(2000) for message in (user(f"word{number}"), assistant("yes"))]
    exchange = ParsedMessages.of([*past, user("and?")])
    assert exchange
    begun = topics.memory.begin(exchange, "", None)
    assert len(begun.earlier) == 2000
    assert len(topics.nums_earlier) == 2001
    assert max(topics.nums_earlier) == MAX_TOPIC_TURNS
    assert not topics.was_locked


def test_a_chat_has_so_many_turns_at_most(ai100: AI100) -> None:
    past = [message for _ in range(MAX_TURNS) for message in (user("tea"), assistant("yes"))]
    with pytest.raises(ValueError, match=f"{MAX_TURNS + 1} turns; at most {MAX_TURNS} can be answered"):
        ParsedMessages.of([*past, user("and?")])


def test_a_conversation_that_goes_on_by_its_name_forgets_its_oldest_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "MAX_TURNS", 5)
    memory = ConversationMemory(KeywordTopics(LISTS))
    for number in range(9):
        exchange = ParsedMessages.of([user(f"tea {number}")])
        assert exchange
        begun = memory.begin(exchange, "", "n")
    assert [turn.question["content"] for turn in begun.conversation.turns] == [
        f"tea {number}" for number in range(4, 9)
    ]


def test_a_client_that_asks_otherwise_again_and_again_fills_no_memory() -> None:
    """One past, ever other questions after it: branches of one conversation, of which those used last are known."""
    memory = ConversationMemory(KeywordTopics(LISTS))

    def begin(*questions: str) -> str:
        past = [message for question in questions[:-1] for message in (user(question), assistant(""))]
        exchange = ParsedMessages.of([*past, user(questions[-1])])
        assert exchange is not None
        begun = memory.begin(exchange, "", None)
        begun.turn.answer = assistant("")
        return begun.conversation.id

    first = begin("river")
    assert {begin("river", f"rain {number}") for number in range(3 * MAX_HISTORIES)} == {first}
    assert len(memory._by_history) == MAX_HISTORIES


@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM],
        [user("a"), user("b")],
        [assistant("a"), user("b")],
        [user("a"), assistant("b")],
        [user("a"), SYSTEM, user("b")],
    ],
)
def test_messages_out_of_turn_are_no_exchange(messages: list[dict[str, str]]) -> None:
    assert ParsedMessages.of(messages) is None


CHUNKS = "\n\nriver old stone\n\nrain hill lamp road\n\nWhere is the river?"
"""A client's own chunks and a question, as the arena sends them."""


@pytest.mark.parametrize("max_context", [None, 60])
def test_the_turn_with_the_chunks_stays(make: Make, max_context: int | None) -> None:
    """Follow-ups are about its chunks, however much was said since; by default a topic is as long as its slot."""
    shapes = StaticShapes(prefill_seq_len=16, ctx_len=192, full_batch_size=1, kv_cache_batch_size=2)
    ai100 = make(shapes=shapes, topics=KeywordTopics({"water": ["river", "rain"]}), max_context=max_context)
    questions = [f"And the river {number}?" for number in range(12)]
    answers = [ai100.chat(question, "c") for question in (CHUNKS, *questions)]
    texts = [said(ai100, answer.prompt_ids) for answer in answers]
    assert all(text.count("rain hill lamp road") == 1 for text in texts)
    assert {answer.details["topic"] for answer in answers} == {"water"}
    reset = [answer for answer in answers if answer.details["status"] == "RESET_TOPIC"]
    assert reset, "so much was said that the rest had to go"
    for answer in answers:
        assert answer.token_ids == ai100.generate(answer.prompt_ids)
    for answer in reset:
        assert answer.report.num_reused_tokens >= len(answers[0].prompt_ids) - 1, "what stays is in the slot"
    ai100.engine.batcher.slots.check_integrity()


def test_chunks_that_leave_no_room_go_too(make: Make) -> None:
    shapes = StaticShapes(prefill_seq_len=16, ctx_len=96, full_batch_size=1, kv_cache_batch_size=2)
    ai100 = make(shapes=shapes, topics=KeywordTopics({"water": ["river", "rain"]}))
    ai100.chat("\n\nriver " + "old " * 50 + "\n\nWhere is the river?", "c")
    following = ai100.chat("And the rain? " + "hill " * 20, "c")
    assert "old" not in said(ai100, following.prompt_ids)
    assert following.details["status"] == "RESET_TOPIC"
