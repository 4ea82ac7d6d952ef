"""The generations behind one answer: each prompt `n` times, side by side, and what they come to together.

| | one generation | several |
|---|---|---|
| usage | its own | prompts count once, however many samples were drawn |
| report | its own | counts summed, each generation's own under `choices` |
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from kvarena.api.engine import EngineUnavailable, GenerationRequest, Report
from kvarena.api.errors import ApiError
from kvarena.api.report_log import TOKEN_COUNTS
from kvarena.api.response_models import PromptTokensDetails, Usage
from kvarena.api.runner import Runner
from kvarena.api.running import Ended, Event, Outcome
from kvarena.api.text_stream import StopRule


class Answer:
    """`requests` in the order of the choices: the first prompt's samples, then the second's. Always `close` it."""

    def __init__(self, runner: Runner, requests: Sequence[GenerationRequest], stop: StopRule, num_samples: int) -> None:
        self._num_samples = num_samples
        self._arrived: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._early: deque[tuple[int, Event]] = deque()
        self._outcomes: dict[int, Outcome] = {}
        self._ids = [request.request_id for request in requests]
        self._num_choices = len(requests)
        self._runner = runner
        self._tickets = [
            runner.submit(request, stop, partial(self._on_event, index)) for index, request in enumerate(requests)
        ]

    def close(self) -> None:
        for ticket in self._tickets:
            ticket.close()

    async def first(self) -> None:
        """Wait until every choice has begun, so that a refusal becomes a status. Raises what `events` raises."""
        begun: set[int] = set()
        while len(begun) < self._num_choices:
            index, event = await self._arrived.get()
            self._early.append((index, self._checked(index, event)))
            begun.add(index)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Every choice's events up to its `Ended`. Raises `ApiError` where the engine refuses or fails."""
        while not self.is_complete:
            index, event = self._early.popleft() if self._early else await self._arrived.get()
            self._checked(index, event)
            if isinstance(event, Ended):
                self._outcomes[index] = event.outcome
            yield index, event

    @property
    def is_complete(self) -> bool:
        return len(self._outcomes) == self._num_choices

    def usage(self) -> Usage:
        """When all have ended."""
        firsts = [self._report(index) for index in range(0, self._num_choices, self._num_samples)]
        prompt = sum(report.num_prompt_tokens for report in firsts)
        generated = sum(outcome.num_tokens for outcome in self._outcomes.values())
        cached = sum(report.num_reused_tokens for report in firsts)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )

    def report(self, request_id: str, contender: str) -> dict[str, Any]:
        """When all have ended."""
        reports = [report_fields(self._report(index)) for index in range(self._num_choices)]
        named = {"request_id": request_id, "contender": contender}
        if len(reports) == 1:
            return {**named, **reports[0]}
        summed = {name: sum(report[name] for report in reports) for name in ("num_prompt_tokens", *TOKEN_COUNTS)}
        return {**named, "approximate": any(r["approximate"] for r in reports), **summed, "choices": reports}

    def _on_event(self, index: int, event: Event) -> None:
        self._arrived.put_nowait((index, event))

    def _report(self, index: int) -> Report:
        return self._outcomes[index].report

    def _checked(self, index: int, event: Event) -> Event:
        if not isinstance(event, Ended) or event.outcome.finish_reason is not None:
            return event
        if event.outcome.refused:
            raise ApiError(400, str(event.outcome.error))
        if isinstance(event.outcome.error, EngineUnavailable):
            raise ApiError(503, str(event.outcome.error), logged=True)
        if event.outcome.error is not None:
            raise ApiError(500, f"the engine failed while serving request {self._ids[index]}", logged=True)
        if self._runner.closing:
            raise ApiError(503, "the server is shutting down", logged=True)
        raise ApiError(499, "the client went away", logged=True)


def report_fields(report: Report) -> dict[str, Any]:
    counts = {name: getattr(report, name) for name in TOKEN_COUNTS}
    return {
        "approximate": report.approximate,
        "num_prompt_tokens": report.num_prompt_tokens,
        **counts,
        **report.details,
        **report.texts,
    }
