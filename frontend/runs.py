"""A question under way: every chosen contender answers it, at the same time or one after the other.

The workers put their events on one queue; whoever draws the page calls `advance`, which applies them to the turn's
answers and, one after the other, asks the next contender. So a run that nobody watches starts nothing new. Several
script runs may watch one run: `advance` and `stop` take a lock. All contenders get one request id, by which their logs
tell of the same question.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import Future

from chat_session import ChatSession
from events import Event
from history import Answer, Chat, Context, Turn
from wire import Sampling


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
