"""Several turns at once: how few runs of the device they take, who waits for whom, who is hurt by what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import pairwise

import pytest
import torch

from ai100.conversation import Chat, Prompt, PromptWriter
from ai100.engine import AI100Generation
from ai100.runtimes.runtime import DeviceLost, StaticShapes
from ai100.slots import SlotKey
from kvarena.engines.base import EngineUnavailable, Sampling
from support.ai100_engine import AI100, Answer, at_once, read
from support.waiting import wait_until

Make = Callable[..., AI100]
FOUR = StaticShapes(prefill_seq_len=16, ctx_len=512, full_batch_size=4, kv_cache_batch_size=5)
LONG = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)
TOPICS = ("river", "bread", "hill", "goat")


class Held:
    """Holds the device back before its next run until all who shall be there have arrived."""

    def __init__(self, ai100: AI100) -> None:
        self._go = threading.Event()
        ai100.runtime.before = self._wait

    def _wait(self, kind: str, slots: Sequence[int]) -> None:
        self._go.wait(20)

    def release(self) -> None:
        self._go.set()


def started(ai100: AI100, question: str, conversation: str, sampling: Sampling = LONG) -> AI100Generation:
    return ai100.start([{"role": "user", "content": question}], conversation, sampling=sampling)


def has_arrived(ai100: AI100, generation: AI100Generation) -> bool:
    turn, batcher = generation._turn, ai100.engine.batcher
    known = [*batcher._arrived, *batcher._waiting, *batcher._running]
    return turn is not None and (turn.ended.is_set() or any(turn is other for other in known))


def in_threads(ai100: AI100, generations: Sequence[AI100Generation]) -> Callable[[], list[Answer | BaseException]]:
    """Begins to read them in order; the result waits for all."""
    results: list[Answer | BaseException | None] = [None] * len(generations)

    def run(number: int) -> None:
        try:
            results[number] = read(generations[number], ai100.engine)
        except Exception as error:
            results[number] = error

    threads = []
    for number in range(len(generations)):
        threads.append(threading.Thread(target=run, args=(number,)))
        threads[-1].start()
        wait_until(partial(has_arrived, ai100, generations[number]))

    def join() -> list[Answer | BaseException]:
        for thread in threads:
            thread.join(60)
        return [result for result in results if result is not None]

    return join


def answers_of(results: Sequence[Answer | BaseException]) -> list[Answer]:
    assert all(isinstance(result, Answer) for result in results), results
    return [result for result in results if isinstance(result, Answer)]


def test_four_conversations_take_a_quarter_of_the_steps(make: Make) -> None:
    together, alone = make(shapes=FOUR), make(shapes=FOUR)
    held = Held(together)
    long = Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)
    join = in_threads(together, [started(together, topic, topic, long) for topic in TOPICS])
    held.release()
    answers = answers_of(join())
    expected = [read(started(alone, topic, topic, long), alone.engine) for topic in TOPICS]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert len(alone.runtime.decodes) == 4 * 199
    assert len(together.runtime.decodes) < len(alone.runtime.decodes) / 3


def test_a_long_prompt_goes_in_between_the_others_tokens(make: Make) -> None:
    ai100 = make(shapes=FOUR)
    order: list[str] = []
    generation = started(ai100, "river", "a", Sampling(max_tokens=400, temperature=0.0, ignore_eos=True))
    tokens = iter(generation)
    next(tokens)
    ai100.runtime.before = lambda kind, slots: order.append(kind)
    long_one = read(started(ai100, "goat " * 150, "b", Sampling(max_tokens=1, temperature=0.0)), ai100.engine)
    list(tokens)
    assert len(long_one.prompt_ids) > 150
    pieces = [at for at, kind in enumerate(order) if kind == "prefill"]
    assert len(pieces) == -(-len(long_one.prompt_ids) // 16)
    assert all(later - earlier == 2 for earlier, later in pairwise(pieces)), "a decode step between"


def test_a_prompt_that_takes_long_to_tokenise_holds_nobody_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ai100 = make(shapes=FOUR)
    of_chat = PromptWriter.of_chat
    is_being_written, go_on = threading.Event(), threading.Event()

    def write(writer: PromptWriter, chat: Chat, wanted: int | None) -> Prompt:
        if chat.turn.question["content"] == "goat":
            is_being_written.set()
            go_on.wait(60)
        return of_chat(writer, chat, wanted)

    monkeypatch.setattr(PromptWriter, "of_chat", write)
    tokens = iter(started(ai100, "river", "a"))
    said = [next(tokens)]
    slow = [started(ai100, "goat", "b"), started(ai100, "goat again", "b")]
    join = in_threads(ai100, slow)
    assert is_being_written.wait(60)
    said += list(tokens)
    assert len(said) == LONG.max_tokens
    slow[1].close()
    go_on.set()
    first, gone = answers_of(join())
    assert first.token_ids == ai100.generate(first.prompt_ids, LONG.max_tokens)
    assert (gone.token_ids, gone.finish_reason) == ([], None)


def test_a_prompt_whose_client_has_gone_is_not_prepared(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ai100 = make(shapes=FOUR)
    of_chat = PromptWriter.of_chat
    asked: list[str] = []
    go_on = threading.Event()

    def write(writer: PromptWriter, chat: Chat, wanted: int | None) -> Prompt:
        asked.append(str(chat.turn.question["content"]))
        go_on.wait(60)
        return of_chat(writer, chat, wanted)

    monkeypatch.setattr(PromptWriter, "of_chat", write)
    generations = [started(ai100, topic, topic) for topic in TOPICS]
    join = in_threads(ai100, generations)
    wait_until(lambda: asked == [TOPICS[0]])
    for gone in generations[1:]:
        gone.close()
    for gone in generations[1:]:
        assert gone._turn is not None
        assert gone._turn.ended.wait(60), "before its prompt's turn"
    go_on.set()
    answers = answers_of(join())
    assert asked == [TOPICS[0]]
    assert [len(answer.token_ids) for answer in answers] == [LONG.max_tokens, 0, 0, 0]


def test_asking_what_there_is_to_admit_cancels_nothing(ai100: AI100) -> None:
    """It is asked as the predicate of a wait, as often as somebody wakes the batcher."""
    batcher, queued = ai100.engine.batcher, Future[Prompt]()
    generation = started(ai100, "river", "a")
    turn = generation._batched(SlotKey("", "a", "water"))
    turn.preparing, turn.closed = queued, True
    with batcher._wake:
        batcher._waiting.append(turn)
        assert batcher._may_admit(), "it can go"
        assert not queued.cancelled()
        queued.set_running_or_notify_cancel()
        assert not batcher._may_admit(), "its prompt is being made"
        batcher._waiting.remove(turn)


def test_turns_of_one_topic_wait_in_order_and_others_pass(make: Make) -> None:
    ai100 = make(shapes=FOUR)
    held = Held(ai100)
    generations = [started(ai100, question, "a") for question in ("river", "rain", "rain again")]
    other = started(ai100, "bread", "a", Sampling(max_tokens=1, temperature=0.0))
    join = in_threads(ai100, [*generations, other])
    held.release()
    first, second, third, passing = answers_of(join())
    assert [answer.details["turn"] for answer in (first, second, third, passing)] == [1, 2, 3, 1]
    assert second.prompt_ids[: len(first.prompt_ids) + 40] == first.prompt_ids + first.token_ids
    assert third.prompt_ids[: len(second.prompt_ids) + 40] == second.prompt_ids + second.token_ids
    assert passing.details["timings"]["total_ms"] < second.details["timings"]["queue_ms"]
    assert third.token_ids == ai100.generate(third.prompt_ids, 40)[:40]


def test_more_turns_than_batch_rows_wait(make: Make) -> None:
    ai100 = make()
    held = Held(ai100)
    join = in_threads(ai100, [started(ai100, topic, topic) for topic in TOPICS])
    held.release()
    answers_of(join())
    assert max(len(rows) for rows in ai100.runtime.decodes) == 2
    assert len(ai100.runtime.decodes) < 3 * 39
    ai100.engine.batcher.slots.check_integrity()


def test_a_turn_that_is_closed_leaves_at_once(make: Make) -> None:
    ai100 = make(shapes=FOUR)
    free = Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)
    ai100.runtime.before = lambda kind, slots: time.sleep(0.01)
    generation = started(ai100, "river", "a", free)
    tokens = iter(generation)
    said = [next(tokens).token_id for _ in range(3)]
    generation.close()
    said += [token.token_id for token in tokens]
    assert len(said) < 300
    assert generation.finish_reason is None
    assert len(ai100.runtime.decodes) < 320
    ai100.runtime.before = lambda kind, slots: None
    following = ai100.ask("rain", "a")
    num_prompt_tokens = len(generation.prompt_token_ids)
    assert following.prompt_ids[:num_prompt_tokens] == list(generation.prompt_token_ids)
    # What is read after the close may come too late to be remembered; what was read before it does not.
    assert following.prompt_ids[num_prompt_tokens:][:3] == said[:3]
    assert following.token_ids == ai100.generate(following.prompt_ids)


def test_a_turn_that_is_closed_while_it_waits_never_was(make: Make) -> None:
    ai100 = make()
    held = Held(ai100)
    waiting = [started(ai100, topic, topic) for topic in TOPICS]
    join = in_threads(ai100, waiting)
    waiting[3].close()
    held.release()
    *others, gone = answers_of(join())
    assert [len(answer.token_ids) for answer in others] == [40] * 3
    assert (gone.token_ids, gone.finish_reason) == ([], None)
    assert ai100.ask("goat", "goat").details["turn"] == 1


def test_an_error_in_one_turn_is_that_turns_alone(make: Make) -> None:
    """In its prefill, or in a batch: what failed together is tried alone."""
    ai100 = make(shapes=FOUR)
    expected = [read(started(ai100, topic, topic), ai100.engine).token_ids for topic in TOPICS]

    def fail(kind: str, slots: Sequence[int]) -> None:
        if (kind == "decode" and 1 in slots) or (kind == "prefill" and 3 in slots):
            raise RuntimeError("out of memory")

    broken = make(shapes=FOUR)
    held = Held(broken)
    join = in_threads(broken, [started(broken, topic, topic) for topic in TOPICS])
    broken.runtime.before = fail
    held.release()
    first, second, third, fourth = join()
    assert [answer.token_ids for answer in answers_of([first, third])] == [expected[0], expected[2]]
    assert all(isinstance(error, RuntimeError) and "out of memory" in str(error) for error in (second, fourth))
    broken.engine.batcher.slots.check_integrity()
    assert [row.topic for row in broken.engine.slot_rows()] == ["water", None, "land", None, None]
    broken.runtime.before = lambda kind, slots: None
    again = read(started(broken, "bread", "bread"), broken.engine)
    assert (again.token_ids, again.details["turn"], again.details["status"]) == (expected[1], 1, "NEW_TOPIC")


def test_a_device_lost_in_the_middle_of_answers(make: Make) -> None:
    """Those that run fail and say why; those that wait, and all later ones, start from empty slots of the new one."""
    ai100 = make()
    before = ai100.ask("river", "old")
    left = iter([None] * 6)

    def lose(kind: str, slots: Sequence[int]) -> None:
        if kind == "decode" and next(left, "lost") == "lost":
            ai100.runtime.before = lambda kind, slots: None
            raise DeviceLost("the card fell off the bus")

    held = Held(ai100)
    join = in_threads(ai100, [started(ai100, topic, topic) for topic in TOPICS[:3]])
    ai100.runtime.before = lose
    held.release()
    first, second, third = join()
    for error in (first, second):
        assert isinstance(error, EngineUnavailable)
        assert "the card fell off the bus" in str(error)
    (answer,) = answers_of([third])
    assert answer.token_ids == ai100.generate(answer.prompt_ids, 40)[:40]
    assert ai100.runtime.num_reopened == 1
    following = ai100.ask("rain", "old")
    assert (following.details["status"], following.report.num_reused_tokens) == ("RESET_TOPIC", 0)
    assert following.prompt_ids[: len(before.prompt_ids)] == before.prompt_ids
    assert following.token_ids == ai100.generate(following.prompt_ids)


def test_a_device_that_stays_lost_fails_everybody_and_may_come_back(ai100: AI100) -> None:
    def gone(kind: str, slots: Sequence[int]) -> None:
        raise (OSError if kind == "reopen" else DeviceLost)("no device found")

    ai100.runtime.before = gone
    for _ in range(3):
        with pytest.raises(EngineUnavailable, match="no device found"):
            ai100.ask("river")
    ai100.runtime.before = lambda kind, slots: None
    answer = ai100.ask("river")
    assert answer.token_ids == ai100.generate(answer.prompt_ids)
    assert answer.details["turn"] == 1


def test_a_bug_in_the_batcher_ends_what_runs_and_nobody_waits_for_ever(
    ai100: AI100, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(ai100.engine.batcher.slots, "extend", fail)
        with pytest.raises(EngineUnavailable, match="error of the server"):
            ai100.ask("river")
    with monkeypatch.context() as patched:
        patched.setattr(ai100.engine.memory, "remember", fail)
        with pytest.raises(AssertionError, match="a bug"):
            ai100.ask("river")
    answer = ai100.ask("river")
    assert answer.token_ids == ai100.generate(answer.prompt_ids)
    ai100.engine.batcher.slots.check_integrity()


def test_two_users_never_share(make: Make) -> None:
    """The KV that a slot holds is that of its own user's tokens and nothing else: probed in the device's memory."""
    ai100 = make(shapes=StaticShapes(16, 128, 1, 1))
    secret = ai100.ask("river seven lamp market", "mine", salt="me")
    mine = ai100.runtime.slot_kv(0).clone()
    assert ai100.engine.batcher.slots.num_evictions == 0
    yours = ai100.ask("bread", "mine", salt="you")
    fresh = make(shapes=StaticShapes(16, 128, 1, 1))
    assert fresh.ask("bread", "mine", salt="you").token_ids == yours.token_ids
    assert len(yours.prompt_ids) < len(secret.prompt_ids)
    assert torch.equal(ai100.runtime.slot_kv(0), fresh.runtime.slot_kv(0)), "not a number of the old topic is left"
    assert not torch.equal(ai100.runtime.slot_kv(0), mine)
    assert ai100.engine.batcher.slots.num_evictions == 1


def test_idle_slots_stay_as_they_are(make: Make) -> None:
    ai100 = make(shapes=FOUR)
    ai100.ask("river", "a")
    kept = ai100.runtime.slot_kv(0).clone()
    for topic in TOPICS[1:]:
        ai100.ask(topic, "a")
    assert torch.equal(ai100.runtime.slot_kv(0), kept)


@pytest.mark.parametrize(
    ("question", "sampling", "says"),
    [
        ("goat " * 600, LONG, "512"),
        ("goat", Sampling(max_tokens=600, temperature=0.0), "512"),
        ("", LONG, "empty"),
    ],
)
def test_what_cannot_be_served_is_refused_and_hurts_nobody(
    ai100: AI100, question: str, sampling: Sampling, says: str
) -> None:
    ai100.ask("river", "a")
    rows = ai100.engine.slot_rows()
    with pytest.raises(ValueError, match=says):
        ai100.ask(question, "b", sampling=sampling)
    assert ai100.engine.slot_rows() == rows
    assert ai100.ask("rain", "a").details["status"] == "INCREMENTAL_PREFILL"


def test_closing_ends_everything(make: Make) -> None:
    ai100 = make()
    held = Held(ai100)
    join = in_threads(ai100, [started(ai100, topic, topic) for topic in TOPICS])
    held.release()
    ai100.engine.close()
    assert all(answer.finish_reason is None or len(answer.token_ids) == 40 for answer in answers_of(join()))
    late = ai100.ask("river")
    assert (late.token_ids, late.finish_reason) == ([], None)


def test_at_once_and_in_turn_over_a_while(make: Make) -> None:
    """Eight users, random topics, some of whom leave: nobody waits for ever and the table stays whole."""
    ai100 = make()

    def talk(user: int) -> Iterator[Answer]:
        for number, topic in enumerate(TOPICS * 2):
            generation = started(ai100, f"{topic} {user}", f"u{user}", Sampling(max_tokens=5, temperature=0.0))
            if (user + number) % 3 == 0:
                generation.close()
            yield read(generation, ai100.engine)

    def last_answer(user: int) -> Answer:
        return list(talk(user))[-1]

    answers = at_once([partial(last_answer, user) for user in range(8)])
    assert len(answers) == 8
    ai100.engine.batcher.slots.check_integrity()
    assert not any(row.in_use for row in ai100.engine.slot_rows())
