"""Questions in progress, and this process's chats by key, so that a reloaded page finds its chat again.

All chosen contenders answer a question, at the same time or one after the other. The workers put their events on one
queue; whoever draws the page calls `advance`, which applies them to the turn's answers and, in sequence, asks the next
contender. So a run that nobody watches starts nothing new. Several pages may watch one run, which ends with the last of
them: `advance` and `stop` take a lock. A page that is reloaded goes on watching. All contenders get the same request
id, by which their logs can be compared. A chat's key is random and in the page's address (`?chat=...`). At most
`MAX_CHATS` are in memory; the longest unused goes first. A `ChatFile` keeps those in which something was asked.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from chat import Answer, Chat, Context, Draft, Turn, Vote
from chat_file import ChatFile
from chat_session import ChatSession
from contender_api import Sampling
from figures import Event


class Run:
    """Owns the futures of its answers; the turn belongs to the chat and outlives the run. `watchers` are the ids of
    pages.
    """

    def __init__(
        self,
        chat: Chat,
        context: Context,
        question: str,
        sessions: Mapping[str, ChatSession],
        sampling: Sampling,
        in_sequence: bool = False,
        repeats: int | None = None,
    ) -> None:
        """Appends the turn to the chat; nothing is sent before the first `advance`. `repeats`: the index of the turn to
        ask again, after the turns that it followed on from.
        """
        earlier = chat if repeats is None else chat.over(repeats, context)
        self._messages = {name: earlier.messages(name, context, question) for name in sessions}
        contenders = [session.contender for session in sessions.values()]
        self.turn = Turn.ask(question, context, contenders, sampling, repeats)
        chat.turns.append(self.turn)
        self.watchers: set[str] = set()
        self._sessions = sessions
        self._sampling = sampling
        self._in_sequence = self.turn.in_sequence = in_sequence
        self._request_id = self.turn.request_id = uuid.uuid4().hex
        self._events: queue.Queue[tuple[str, Event]] = queue.Queue()
        self._futures: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        return all(answer.over for answer in self.turn.answers.values())

    def advance(self) -> bool:
        """Applies what has arrived and asks whose turn it is; whether the run goes on."""
        with self._lock:
            self._apply_events()
            self._ask_next()
        return not self.over

    def stop(self) -> None:
        """Closes the streams. What has arrived stays; unfinished answers are marked as interrupted."""
        with self._lock:
            for future in self._futures.values():
                future.cancel()
            self._apply_events()
            for answer in self.turn.answers.values():
                answer.interrupt()

    def _apply_events(self) -> None:
        while True:
            try:
                name, event = self._events.get_nowait()
            except queue.Empty:
                return
            self.turn.answers[name].apply(event)

    def _ask_next(self) -> None:
        for name, answer in self.turn.answers.items():
            if name not in self._futures and not answer.over:
                self._ask(name, answer)
            if self._in_sequence and not answer.over:
                return

    def _ask(self, name: str, answer: Answer) -> None:
        def put(event: Event) -> None:
            self._events.put((name, event))

        answer.start()
        self._futures[name] = self._sessions[name].answer(self._messages[name], self._sampling, put, self._request_id)


MAX_CHATS = 64
RELOAD_S = 20.0
"""Within this time a page reloads, even on a slow machine."""


@dataclass
class OpenChat:
    """A chat and the question under way in it, if any. `keep` is called after each change that should last."""

    chat: Chat = field(default_factory=Chat)
    run: Run | None = None
    keep: Callable[[Chat], None] = lambda chat: None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def busy(self) -> bool:
        return self.run is not None

    @property
    def state(self) -> tuple[object, ...]:
        """What a page draws of it: if it changes, another page has gone on with the chat."""
        return self.busy, len(self.chat.turns), sum(turn.vote is not None for turn in self.chat.turns)

    def begin(self, make_run: Callable[[], Run], draft: Draft | None = None) -> bool:
        """Starts a run; False if another page's is under way. `draft` is how the asking page is set."""
        with self._lock:
            if self.run is not None:
                return False
            self.run = make_run()
            self.chat.draft = draft or self.chat.draft
        self.keep(self.chat)
        return True

    def change(self, draft: Draft) -> None:
        """Somebody changed the page's settings."""
        self.chat.draft = draft
        self.keep(self.chat)

    def end(self, run: Run) -> None:
        """Call for a run that is over; only the first call has an effect."""
        with self._lock:
            if self.run is not run:
                return
            self.run = None
        self.keep(self.chat)

    def vote(self, index: int, vote: Vote) -> None:
        """The first vote on a turn counts."""
        with self._lock:
            turn = self.chat.turns[index]
            if not turn.can_vote:
                return
            turn.vote = vote
        self.keep(self.chat)

    def leave(self, watcher: str, within_s: float = 0) -> None:
        """A page has gone. The run ends with the last one that watched it, unless another comes within `within_s`."""
        if (run := self.run) is None:
            return
        run.watchers.discard(watcher)
        if within_s:
            timer = threading.Timer(within_s, self._end_unwatched, [run])
            timer.daemon = True
            timer.start()
        else:
            self._end_unwatched(run)

    def _end_unwatched(self, run: Run) -> None:
        if self.run is run and not run.watchers:
            self.stop()

    def stop(self) -> None:
        """Ends the run; partial answers stay in the chat, marked as interrupted."""
        if (run := self.run) is not None:
            run.stop()
            self.end(run)


class ChatStore:
    """May be used by several sessions at once. `kind` is the class of its chats."""

    def __init__(self, max_chats: int = MAX_CHATS, kind: type[Chat] = Chat, file: ChatFile | None = None) -> None:
        self._kind, self._file = kind, file
        self._max_chats = max_chats
        self._chats: OrderedDict[str, OpenChat] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> OpenChat | None:
        """From memory, else from the file."""
        with self._lock:
            if key in self._chats:
                self._chats.move_to_end(key)
                return self._chats[key]
            kept = self._file.load(key, self._kind) if self._file and key else None
            return self._open(kept) if kept else None

    def new(self) -> OpenChat:
        """An empty chat."""
        with self._lock:
            return self._open(self._kind())

    def _open(self, chat: Chat) -> OpenChat:
        """Stops and drops the longest unused chats to make room."""
        opened = self._chats[chat.key] = OpenChat(chat)
        if self._file:
            opened.keep = self._file.keep
        while len(self._chats) > self._max_chats:
            _, forgotten = self._chats.popitem(last=False)
            forgotten.stop()
        return opened
