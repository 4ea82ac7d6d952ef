"""Runs the server's generations: so many at once, the others in the order of their arrival, each accounted for once.

"Accounted for" is one log line, the metrics, and, by the caller, who is told of each outcome, the report. It happens
when a generation has really ended, also where its client went away long before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from kvarena.engines.base import Engine, GenerationRequest, Report
from kvarena.server.detokenizer import StopRule
from kvarena.server.generation import Ended, Event, Outcome, RunningGeneration, log_outcome
from kvarena.server.metrics import Metrics

logger = logging.getLogger(__name__)


class Ticket:
    """A generation that was handed in. `close` ends it, whether it runs yet or not; its events then end at once."""

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
        """Events go to `emit`, on the loop; `Ended` is the last one. What is accounted for goes to `tell`, before that
        or long after.
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
