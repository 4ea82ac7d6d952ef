"""Runs the server's generations: at most `max_running` at once, the others in order of arrival.

Each runs on a thread of its own; its events arrive on the event loop, in order, through a callback.

| where | what happens |
|---|---|
| event loop | `start`, `close`; every event is emitted there, and `Ended` is the last one and comes once |
| thread | the engine: `generate`, each token, `close`; and the text of each token |

A token that is under way when a generation is closed ends first; nobody waits for it. A generation is accounted for
once, when it has really ended, which may be long after its client left: in the log, the metrics and, by whoever handed
it in, the report.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from kvarena.engines.base import Engine, FinishReason, Generation, GenerationRequest, Report
from kvarena.server.log import Outcome, log_outcome
from kvarena.server.metrics import Metrics
from kvarena.server.text import StopRule, TextDelta, TextStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    outcome: Outcome


Event = TextDelta | Ended


@dataclass
class RunningGeneration:
    """`emit` gets every event on the event loop that called `start`."""

    engine: Engine
    request: GenerationRequest
    stop: StopRule
    emit: Callable[[Event], None]
    _closed: bool = False
    _generation: Generation | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _num_tokens: int = 0
    _first_token_at: float | None = None
    _last_token_at: float | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        name = f"generation-{self.request.request_id}"
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except RuntimeError as error:  # The machine gives no more threads.
            now = time.perf_counter()
            self.emit(Ended(Outcome(Report(), None, 0, now, now, error=error)))

    def close(self) -> None:
        """From any thread, more than once."""
        with self._lock:
            self._closed = True
            generation = self._generation
        if generation is not None:
            generation.close()

    def _run(self) -> None:
        started_at = time.perf_counter()
        reason, error = None, None
        try:
            generation = self.engine.generate(self.request)
            with contextlib.closing(generation):
                reason = self._iterate(generation)
        except BaseException as raised:
            # Whatever an engine raises is the request's end and nothing else's.
            error = raised
        outcome = Outcome(
            self._generation.report if self._generation else Report(),
            reason,
            self._num_tokens,
            started_at,
            time.perf_counter(),
            self._first_token_at,
            self._last_token_at,
            error,
        )
        self._emit(Ended(outcome))

    def _iterate(self, generation: Generation) -> FinishReason | None:
        """Tokens until the engine, a stop string or the client ends them; says which of the first two it was."""
        with self._lock:
            self._generation = generation
            if self._closed:
                return None
        text: TextStream | None = None
        tokens = iter(generation)
        try:
            for token in tokens:
                self._count_token()
                if self._closed:
                    return None
                text = text or TextStream(self.engine.tokenizer, generation.prompt_token_ids, self.stop)
                self._emit(text.push(token))
                if text.stopped:
                    return "stop"
        finally:
            if isinstance(tokens, Generator):
                tokens.close()  # Its own cleaning up, in the thread that it ran in.
        if self._closed:
            return None
        assert generation.finish_reason is not None, "a generation's tokens ended without a finish_reason"
        if text is not None and (rest := text.flush()):
            self._emit(rest)
        return generation.finish_reason

    def _count_token(self) -> None:
        self._num_tokens += 1
        self._last_token_at = time.perf_counter()
        self._first_token_at = self._first_token_at or self._last_token_at

    def _emit(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: the server has ended.
            self._loop.call_soon_threadsafe(self.emit, event)


class Ticket:
    """A generation that was handed in. `close` ends it, running or not, and its events end at once."""

    def __init__(self, emit: Callable[[Event], None], tell: Callable[[Outcome], None]) -> None:
        self._emit = emit
        self.tell = tell
        self.ended = False
        self.on_close: Callable[[], Any] = lambda: None
        self.arrived_at = time.perf_counter()

    def close(self) -> None:
        if not self.ended:
            self.on_close()
            self.emit(_ended_early(self.arrived_at))

    def emit(self, event: Event) -> None:
        if not self.ended:
            self.ended = isinstance(event, Ended)
            self._emit(event)


class Runner:
    """Lives on one event loop."""

    def __init__(self, engine: Engine, metrics: Metrics, max_running: int) -> None:
        self._engine = engine
        self._metrics = metrics
        self._slots = asyncio.Semaphore(max_running)
        self._live: dict[Ticket, asyncio.Task[None]] = {}
        self.closing = False

    def submit(
        self,
        request: GenerationRequest,
        stop: StopRule,
        emit: Callable[[Event], None],
        tell: Callable[[Outcome], None],
    ) -> Ticket:
        """Events go to `emit`, on the loop; `Ended` is the last one. The outcome that is accounted for goes to `tell`,
        before that or long after.
        """
        ticket = Ticket(emit, tell)
        task = asyncio.create_task(self._drive(ticket, request, stop))
        self._live[ticket] = task
        task.add_done_callback(lambda _: self._live.pop(ticket, None))
        if self.closing:
            ticket.close()
        return ticket

    def close(self) -> None:
        """End all generations; what is handed in from now on ends at once."""
        self.closing = True
        for ticket in list(self._live):
            ticket.close()

    async def join(self, timeout_s: float) -> None:
        """Wait for the threads of closed generations."""
        if self._live:
            await asyncio.wait(self._live.values(), timeout=timeout_s)

    async def _drive(self, ticket: Ticket, request: GenerationRequest, stop: StopRule) -> None:
        """Wait for a slot, run, account. The slot is free again when the thread has ended."""
        if not await self._wait_for_slot(ticket):
            self._account(ticket, request, _ended_early(ticket.arrived_at).outcome)
            return
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_event(event: Event) -> None:
            try:
                if isinstance(event, Ended):
                    self._account(ticket, request, event.outcome)
            finally:
                ticket.emit(event)
                if isinstance(event, Ended) and not ended.done():
                    ended.set_result(None)

        running = RunningGeneration(self._engine, request, stop, on_event)
        ticket.on_close = running.close
        try:
            with self._metrics.running(), contextlib.closing(running):
                running.start()
                await ended
        finally:
            self._slots.release()

    async def _wait_for_slot(self, ticket: Ticket) -> bool:
        """False when the ticket was closed meanwhile."""
        acquire = asyncio.ensure_future(self._slots.acquire())
        ticket.on_close = acquire.cancel
        if ticket.ended:
            acquire.cancel()
        with self._metrics.waiting():
            await asyncio.wait([acquire])
        if not acquire.cancelled() and ticket.ended:
            self._slots.release()
        return not ticket.ended

    def _account(self, ticket: Ticket, request: GenerationRequest, outcome: Outcome) -> None:
        self._metrics.observe(outcome, ticket.arrived_at)
        ticket.tell(outcome)
        if outcome.error is not None and not outcome.refused:
            logger.error("request %s failed", request.http_request_id, exc_info=outcome.error)
        if not outcome.refused:  # A refusal has its line where it is answered.
            log_outcome(self._engine.contender, request, outcome, ticket.arrived_at)


def _ended_early(arrived_at: float) -> Ended:
    return Ended(Outcome(Report(), None, 0, arrived_at, time.perf_counter()))
