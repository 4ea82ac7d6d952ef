"""A question under way on real sessions: at the same time, one after the other, stopped, one side down."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from chat import Chat, Context
from chat_session import ChatSession
from chat_view import speed_html
from contender_api import Sampling
from runs import ChatStore, Run
from settings import Contender
from support.small_openai_server import OFFER, SmallServer, StartServer
from support.waiting import wait_until

Prepare = Callable[..., Run]
CONTEXT = Context("Be brief.")
HELD = {"pieces": ["word "] * 50, "hold_after": 10}
"""Answers that are under way until the test lets them go on."""


@pytest.fixture
def prepare() -> Iterator[Prepare]:
    """A run of one question over servers named a, b, ...; nothing is sent before its first `advance`."""
    opened: list[ChatSession] = []

    def run(*servers: SmallServer, chat: Chat | None = None, in_sequence: bool = False) -> Run:
        contenders = [Contender(name, name, server.url) for name, server in zip("abc", servers, strict=False)]
        sessions = {contender.name: ChatSession(contender) for contender in contenders}
        opened.extend(sessions.values())
        return Run(chat or Chat(), CONTEXT, "Who?", sessions, Sampling(), in_sequence)

    yield run
    for session in opened:
        session.close()


def watch(run: Run, condition: Callable[[], bool] = lambda: False, timeout_s: float = 20.0) -> None:
    """Advances the run until it is over or the condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while run.advance() and not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_both_answer_at_the_same_time(small_server: StartServer, prepare: Prepare) -> None:
    a, b = small_server(**HELD), small_server(**HELD)
    run = prepare(a, b)
    watch(run, lambda: all(answer.text == "word " * 10 for answer in run.turn.answers.values()))
    assert a.num_open_streams == b.num_open_streams == 1
    for server in (a, b):
        server.go_on.set()
    watch(run)
    assert [answer.state for answer in run.turn.answers.values()] == ["done", "done"]
    assert all(answer.text == "word " * 50 for answer in run.turn.answers.values())


def test_all_contenders_get_one_id_for_a_question_and_another_for_the_next(
    small_server: StartServer, prepare: Prepare
) -> None:
    a, b = small_server(), small_server()
    for _ in range(2):
        watch(prepare(a, b))
    ids = [[headers["x-request-id"] for path, _, headers in s.requests if path.endswith("completions")] for s in (a, b)]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


def test_one_after_the_other_never_overlaps(small_server: StartServer, prepare: Prepare) -> None:
    a, b = small_server(pieces=["word "] * 5, delay_s=0.02), small_server(pieces=["word "] * 5, delay_s=0.02)
    run = prepare(a, b, in_sequence=True)
    first, second = run.turn.answers.values()
    while run.advance():
        assert first.over or second.started_s is None
        assert first.over or not b.num_open_streams
        if first.over:
            wait_until(lambda: not a.num_open_streams, "the server counts a stream until just after its last byte")
        time.sleep(0.005)
    assert (first.state, second.state) == ("done", "done")


def test_one_contender_down_leaves_the_other_alone(small_server: StartServer, prepare: Prepare) -> None:
    dead, alive = small_server(), small_server(offer=OFFER)
    dead.stop()
    for in_sequence in (False, True):
        run = prepare(dead, alive, in_sequence=in_sequence)
        watch(run)
        a, b = run.turn.answers.values()
        assert a.state == "failed"
        assert "Nothing answers" in a.error
        assert (b.state, b.text) == ("done", "Hello, world")


def test_of_three_one_of_which_failed_the_two_compared_are_named(small_server: StartServer, prepare: Prepare) -> None:
    a, b, c = small_server(silence_s=3.0), small_server(), small_server()
    c.stop()
    run = prepare(a, b, c)
    watch(run)
    assert re.search(r">b: [\d.]+ times faster than a to the first token<", speed_html(run.turn))


def test_stop_keeps_partial_text_and_ends_the_streams(small_server: StartServer, prepare: Prepare) -> None:
    held, waiting = small_server(**HELD), small_server()
    run = prepare(held, waiting, in_sequence=True)
    first, second = run.turn.answers.values()
    watch(run, lambda: first.text == "word " * 10)
    run.stop()
    assert (first.state, second.state, second.text) == ("interrupted", "interrupted", "")
    deadline_s = time.monotonic() + 5
    while not held.num_broken_streams:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert not run.advance()
    assert first.text == "word " * 10
    assert not waiting.completions(), "whoever had not been asked is not asked any more"


def test_several_watchers_lose_and_repeat_nothing(small_server: StartServer, prepare: Prepare) -> None:
    pieces = [f"{number} " for number in range(200)]
    run = prepare(small_server(pieces=pieces), small_server(pieces=pieces))
    watchers = [threading.Thread(target=watch, args=[run]) for _ in range(4)]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join()
    assert all(answer.text == "".join(pieces) for answer in run.turn.answers.values())


def test_contenders_get_the_same_messages(small_server: StartServer, prepare: Prepare) -> None:
    blend, plain = small_server(offer=OFFER), small_server()
    watch(prepare(blend, plain))
    assert blend.completions()[0]["messages"] == plain.completions()[0]["messages"]


def test_of_two_pages_that_ask_at_once_one_waits(small_server: StartServer, prepare: Prepare) -> None:
    opened = ChatStore().new()
    begun = [opened.begin(lambda: prepare(small_server(), chat=opened.chat)) for _ in range(2)]
    assert begun == [True, False]
    assert len(opened.chat.turns) == 1
    assert opened.run
    watch(run := opened.run)
    opened.end(run)
    assert opened.begin(lambda: prepare(small_server(), chat=opened.chat))
    opened.end(run)
    assert opened.busy, "the other page comes late to the end of the run before"


def test_a_run_ends_with_the_last_page_that_watches_it(small_server: StartServer, prepare: Prepare) -> None:
    opened = ChatStore().new()
    opened.begin(lambda: prepare(small_server(**HELD), chat=opened.chat))
    assert opened.run
    opened.run.watchers.update(("here", "there"))
    opened.leave("here")
    assert opened.busy
    opened.leave("there", within_s=0.05)
    opened.run.watchers.add("reloaded")
    time.sleep(0.2)
    assert opened.busy
    opened.leave("reloaded", within_s=0.05)
    assert opened.busy
    wait_until(lambda: not opened.busy)
    assert opened.chat.turns[0].answers["a"].state == "interrupted"


def test_forgotten_chat_is_stopped(small_server: StartServer, prepare: Prepare) -> None:
    store = ChatStore(max_chats=2)
    old = store.new()
    old.run = run = prepare(small_server(**HELD), chat=old.chat)
    watch(run, lambda: len(run.turn.answers["a"].text) > 0)
    kept = store.new()
    assert store.get(kept.chat.key) is kept
    store.new()
    assert store.get(old.chat.key) is None
    assert run.turn.answers["a"].state == "interrupted"
