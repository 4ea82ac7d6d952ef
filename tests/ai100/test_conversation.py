"""Which tokens a turn becomes, and which conversation it belongs to: by name, by history, or a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ai100.conversation import ConversationMemory, ParsedMessages
from ai100.topics import KeywordTopics
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
    assert all(row["topic"] is None for row in ai100.engine.slot_rows())


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
