"""Questions in progress, and the chats of this page process by key, so that a reloaded page finds its chat again.

Every chosen contender answers a question, at the same time or one after the other. The workers put their events on
one queue; whoever draws the page calls `advance`, which applies them to the turn's answers and, one after the other,
asks the next contender. So a run that nobody watches starts nothing new. Several script runs may watch one run:
`advance` and `stop` take a lock. All contenders get one request id, by which their logs tell of the same question.
A chat's key is random and stands in the page's address (`?chat=...`). At most `MAX_CHATS` are kept, the longest
unused one goes first; a restart of the page forgets them all.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from chat import Answer, Chat, Context, Turn
from chat_session import ChatSession
from contender_api import Sampling
from figures import Event


class Run:
    """Owns the futures of its answers; the turn belongs to the chat and outlives the run."""

    def __init__(
        self,
        turn: Turn,
        messages: Mapping[str, list[dict[str, str]]],
        sessions: Mapping[str, ChatSession],
        sampling: Sampling,
        in_sequence: bool,
    ) -> None:
        self.turn = turn
        self._messages = messages
        self._sessions = sessions
        self._sampling = sampling
        self._in_sequence = in_sequence
        self._request_id = uuid.uuid4().hex
        self._events: queue.Queue[tuple[str, Event]] = queue.Queue()
        self._futures: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    @classmethod
    def of_question(
        cls,
        chat: Chat,
        context: Context,
        question: str,
        sessions: Mapping[str, ChatSession],
        sampling: Sampling,
        in_sequence: bool = False,
    ) -> Run:
        """Appends the turn to the chat; nothing is sent before the first `advance`."""
        messages = {name: chat.messages(name, context, question) for name in sessions}
        turn = Turn.ask(question, context, [session.contender for session in sessions.values()])
        chat.turns.append(turn)
        return cls(turn, messages, sessions, sampling, in_sequence)

    @property
    def over(self) -> bool:
        return all(answer.over for answer in self.turn.answers.values())

    def advance(self) -> bool:
        """Applies what has arrived and asks whoever's turn it is; whether the run goes on."""
        with self._lock:
            self._apply_events()
            self._ask_next()
        return not self.over

    def stop(self) -> None:
        """Closes the streams. What has arrived stays; answers that were not over are marked as interrupted."""
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


@dataclass
class OpenChat:
    """A chat and the question that is under way in it, if any."""

    chat: Chat = field(default_factory=Chat)
    run: Run | None = None

    @property
    def busy(self) -> bool:
        return self.run is not None

    def stop(self) -> None:
        """Ends the run; partial answers stay in the chat, marked as interrupted."""
        if self.run is not None:
            self.run.stop()
            self.run = None


class ChatStore:
    """Safe to use from several sessions at once. `make_chat` makes an empty chat."""

    def __init__(self, max_chats: int = MAX_CHATS, make_chat: Callable[[], Chat] = Chat) -> None:
        self._make_chat = make_chat
        self._max_chats = max_chats
        self._chats: OrderedDict[str, OpenChat] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> OpenChat | None:
        with self._lock:
            if key in self._chats:
                self._chats.move_to_end(key)
            return self._chats.get(key)

    def new(self) -> OpenChat:
        """An empty chat; the longest unused ones are stopped and forgotten to make room."""
        opened = OpenChat(self._make_chat())
        with self._lock:
            self._chats[opened.chat.key] = opened
            while len(self._chats) > self._max_chats:
                _, forgotten = self._chats.popitem(last=False)
                forgotten.stop()
        return opened
