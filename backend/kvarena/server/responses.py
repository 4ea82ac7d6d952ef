"""From generations to an HTTP response: as one object, or as a stream of chunks.

A request's generations are one group, each prompt `n` times:

| | one generation | several |
|---|---|---|
| usage | its own | prompts count once, however many samples were drawn |
| report | its own | counts summed, each generation's own under `choices` |

Chat and text completions differ in their objects alone (`ResponseBuilder`); when a stream begins, when the report is
filed and when usage is sent is the same for both. The client is watched from its request to the last byte: as soon as
it is gone, or the answer is complete, the group is closed and what still runs ends.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvarena.engines.base import (
    TOKEN_COUNTS,
    EngineUnavailable,
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    PromptTooLong,
    Report,
    Sampling,
)
from kvarena.server.errors import CONTEXT_LENGTH_EXCEEDED, ApiError
from kvarena.server.log import Outcome
from kvarena.server.protocol import PromptTokensDetails, ResponseModel, SamplingFields, Usage
from kvarena.server.requests import Prompts, generation_requests
from kvarena.server.runner import Ended, Event
from kvarena.server.state import Server
from kvarena.server.text import StopRule, TextDelta, TokenTexts


class ClientWatch:
    """`with ClientWatch(request, answer):` closes the answer when its client goes, and at the end in any case.

    `keep` leaves it open beyond the block: for a stream, which closes it itself.
    """

    def __init__(self, request: Request, answer: GenerationGroup) -> None:
        self._request = request
        self._answer = answer
        self._kept = False

    def __enter__(self) -> ClientWatch:
        self._task = asyncio.create_task(self._watch())
        return self

    def __exit__(self, *raised: object) -> None:
        if not self._kept:
            self.close()

    def keep(self) -> None:
        self._kept = True

    def close(self) -> None:
        self._task.cancel()
        self._answer.close()

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._answer.close()


class EventStream(Response):
    """Server-sent events: each of `events` is one, then `[DONE]`. An `ApiError` on the way becomes the last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], watch: ClientWatch) -> None:
        self._events = events
        self._watch = watch
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [item for item in self.raw_headers if item[0] != b"content-length"]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for line in self._lines():
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except OSError:
            pass  # The client is gone, and some servers say so here.
        finally:
            self._watch.close()

    async def _lines(self) -> AsyncIterator[bytes]:
        try:
            async for event in self._events:
                yield b"data: " + event + b"\n\n"
        except ApiError as error:
            yield b"data: " + error.json_bytes() + b"\n\n"
        yield b"data: [DONE]\n\n"


class GenerationGroup:
    """`requests` in the order of the choices: the first prompt's samples, then the second's. Always `close` it.

    The report is filed when all have really ended, and before `events` says so; not where nothing was counted.
    """

    def __init__(
        self, server: Server, answer_id: str, requests: Sequence[GenerationRequest], stop: StopRule, num_samples: int
    ) -> None:
        self._server, self._answer_id = server, answer_id
        self._num_samples = num_samples
        self._arrived: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._early: deque[tuple[int, Event]] = deque()
        self._outcomes: dict[int, Outcome] = {}
        self._ids = [request.request_id for request in requests]
        self._num_choices = len(requests)
        self._tickets = [
            server.runner.submit(request, stop, partial(self._on_event, index), partial(self._on_outcome, index))
            for index, request in enumerate(requests)
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
        num_ended = 0
        while num_ended < self._num_choices:
            index, event = self._early.popleft() if self._early else await self._arrived.get()
            self._checked(index, event)
            num_ended += isinstance(event, Ended)
            yield index, event

    def usage(self) -> Usage:
        """When all have ended."""
        firsts = [self._report(index) for index in range(0, self._num_choices, self._num_samples)]
        cached = sum(report.num_reused_tokens for report in firsts)
        usage = usage_of(
            sum(report.num_prompt_tokens for report in firsts),
            sum(outcome.num_tokens for outcome in self._outcomes.values()),
        )
        usage.prompt_tokens_details = PromptTokensDetails(cached_tokens=cached)
        return usage

    def report(self) -> dict[str, Any]:
        """When all have ended."""
        reports = [report_fields(self._report(index)) for index in range(self._num_choices)]
        named = {"request_id": self._answer_id, "contender": self._server.engine.contender}
        if len(reports) == 1:
            return {**named, **reports[0]}
        summed = {name: sum(report[name] for report in reports) for name in ("num_prompt_tokens", *TOKEN_COUNTS)}
        return {**named, "approximate": any(r["approximate"] for r in reports), **summed, "choices": reports}

    def _on_event(self, index: int, event: Event) -> None:
        self._arrived.put_nowait((index, event))

    def _on_outcome(self, index: int, outcome: Outcome) -> None:
        self._outcomes[index] = outcome
        counted = any(outcome.report.num_prompt_tokens for outcome in self._outcomes.values())
        if counted and len(self._outcomes) == self._num_choices:
            self._server.reports.add(self.report())

    def _report(self, index: int) -> Report:
        return self._outcomes[index].report

    def _checked(self, index: int, event: Event) -> Event:
        if not isinstance(event, Ended) or event.outcome.finish_reason is not None:
            return event
        if event.outcome.refused:
            too_long = isinstance(event.outcome.error, PromptTooLong)
            raise ApiError(400, str(event.outcome.error), code=CONTEXT_LENGTH_EXCEEDED if too_long else None)
        if isinstance(event.outcome.error, EngineUnavailable):
            raise ApiError(503, str(event.outcome.error), logged=True)
        if event.outcome.error is not None:
            raise ApiError(500, f"the engine failed while serving request {self._ids[index]}", logged=True)
        if self._server.runner.closing:
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


def usage_of(num_prompt_tokens: int, num_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=num_prompt_tokens, completion_tokens=num_tokens, total_tokens=num_prompt_tokens + num_tokens
    )


@dataclass
class Choice:
    """A choice so far. `num_chars`: of the tokens' texts, where the next logprob's token begins. `tells_usage`: every
    chunk of its stream has the usage so far.
    """

    index: int
    tells_usage: bool = False
    texts: list[str] = field(default_factory=list)
    tokens: list[GeneratedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_chars: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0

    def usage(self) -> dict[str, Any]:
        """The chunk's field, where it has one."""
        return {"usage": usage_of(self.num_prompt_tokens, self.num_tokens)} if self.tells_usage else {}


@dataclass(frozen=True)
class ResponseBuilder(ABC):
    """The objects of one kind of completion."""

    answer_id: str
    model: str
    token_texts: TokenTexts
    wants_logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))

    @abstractmethod
    def whole(self, choices: list[Choice], usage: Usage, report: dict[str, Any]) -> ResponseModel: ...

    def opening(self, choice: Choice) -> ResponseModel | None:
        """What a choice's stream begins with, if not with its first piece."""
        return None

    @abstractmethod
    def piece(self, choice: Choice, text: str, token: GeneratedToken | None) -> ResponseModel: ...

    @abstractmethod
    def closing(self, choice: Choice) -> ResponseModel: ...

    @abstractmethod
    def usage(self, usage: Usage) -> ResponseModel: ...


async def respond(
    request: Request, server: Server, form: ResponseBuilder, body: SamplingFields, sampling: Sampling, prompts: Prompts
) -> Response:
    requests = generation_requests(server, request, form.answer_id, body, sampling, prompts)
    stop = StopRule(body.stop_strings, body.include_stop_str_in_output)
    answer = GenerationGroup(server, form.answer_id, requests, stop, body.num_samples)
    with ClientWatch(request, answer) as watch:
        await answer.first()
        if body.stream:
            watch.keep()
            return EventStream(_chunks(answer, form, body), watch)
        return Response(await _whole(answer, form), media_type="application/json")


async def _whole(answer: GenerationGroup, form: ResponseBuilder) -> bytes:
    choices: dict[int, Choice] = {}
    async for index, event in answer.events():
        choice = choices.setdefault(index, Choice(index))
        if isinstance(event, Ended):
            choice.finish_reason = event.outcome.finish_reason
            continue
        choice.texts.append(event.text)
        if event.token is not None and form.wants_logprobs:
            choice.tokens.append(event.token)
    in_order = [choices[index] for index in sorted(choices)]
    return form.whole(in_order, answer.usage(), answer.report()).json_bytes()


async def _chunks(answer: GenerationGroup, form: ResponseBuilder, body: SamplingFields) -> AsyncIterator[bytes]:
    choices: dict[int, Choice] = {}
    async for index, event in answer.events():
        choice = choices.get(index)
        if choice is None:
            choice = choices[index] = Choice(index, body.tells_usage_continuously)
            choice.num_prompt_tokens = event.num_prompt_tokens if isinstance(event, TextDelta) else 0
            if opening := form.opening(choice):
                yield opening.json_bytes()
        if isinstance(event, Ended):
            choice.finish_reason = event.outcome.finish_reason
            yield form.closing(choice).json_bytes()
            continue
        choice.num_tokens += event.token is not None
        if event.text or (event.token is not None and (form.wants_logprobs or choice.tells_usage)):
            yield form.piece(choice, event.text, event.token).json_bytes()
    if body.includes_usage:
        yield form.usage(answer.usage()).json_bytes()
