"""From an answer's events to HTTP: as one object, or as a stream of chunks. What they look like is a `Form`'s business.

A request for chat and one for text differ in their objects alone; when a stream begins, when the report is filed, when
usage is sent, and what becomes of a client that goes away is the same for both, and is here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from kvarena.api.answer import Answer
from kvarena.api.engine import FinishReason, GeneratedToken
from kvarena.api.event_stream import ClientWatch, EventStream
from kvarena.api.request_models import SamplingFields
from kvarena.api.response_models import ResponseModel, Usage
from kvarena.api.running import Ended
from kvarena.api.server import Server


@dataclass
class Choice:
    """A choice so far. `num_chars`: of the tokens' texts, where the next logprob's token begins."""

    index: int
    texts: list[str] = field(default_factory=list)
    tokens: list[GeneratedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_chars: int = 0


class Form(Protocol):
    """The objects of one kind of completion."""

    @property
    def answer_id(self) -> str: ...

    @property
    def wants_logprobs(self) -> bool: ...

    def whole(self, choices: list[Choice], usage: Usage, report: dict[str, Any]) -> ResponseModel: ...

    def opening(self, choice: Choice) -> ResponseModel | None:
        """What a choice's stream begins with."""
        ...

    def piece(self, choice: Choice, text: str, token: GeneratedToken | None) -> ResponseModel: ...

    def closing(self, choice: Choice) -> ResponseModel: ...

    def usage(self, usage: Usage) -> ResponseModel: ...


async def respond(request: Request, server: Server, answer: Answer, form: Form, body: SamplingFields) -> Response:
    with ClientWatch(request, answer) as watch:
        await answer.first()
        if body.stream:
            watch.keep()
            return EventStream(_chunks(server, answer, form, includes_usage=body.includes_usage), watch)
        return Response(await _whole(server, answer, form), media_type="application/json")


async def _whole(server: Server, answer: Answer, form: Form) -> bytes:
    choices: dict[int, Choice] = {}
    async for index, event in answer.events():
        choice = choices.setdefault(index, Choice(index))
        if isinstance(event, Ended):
            choice.finish_reason = event.outcome.finish_reason
            continue
        choice.texts.append(event.text)
        if event.token is not None and form.wants_logprobs:
            choice.tokens.append(event.token)
    report = _file_report(server, answer, form)
    in_order = [choices[index] for index in sorted(choices)]
    return form.whole(in_order, answer.usage(), report).json_bytes()


async def _chunks(server: Server, answer: Answer, form: Form, *, includes_usage: bool) -> AsyncIterator[bytes]:
    choices: dict[int, Choice] = {}
    async for index, event in answer.events():
        choice = choices.get(index)
        if choice is None:
            choice = choices[index] = Choice(index)
            if opening := form.opening(choice):
                yield opening.json_bytes()
        if isinstance(event, Ended):
            choice.finish_reason = event.outcome.finish_reason
            if answer.is_complete:
                _file_report(server, answer, form)
            yield form.closing(choice).json_bytes()
        elif event.text or (event.token is not None and form.wants_logprobs):
            yield form.piece(choice, event.text, event.token).json_bytes()
    if includes_usage:
        yield form.usage(answer.usage()).json_bytes()


def _file_report(server: Server, answer: Answer, form: Form) -> dict[str, Any]:
    report = answer.report(form.answer_id, server.engine.contender)
    server.reports.add(report)
    return report
