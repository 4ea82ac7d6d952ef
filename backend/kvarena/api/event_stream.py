"""Answers to clients that may go away: whoever waits for the answer is watched from its request to the last byte.

`answer.close` is called as soon as the client is gone, and when the answer is complete; what was still running then
ends, and with it whoever waited for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvarena.api.errors import ApiError


class Closeable(Protocol):
    def close(self) -> None: ...


class ClientWatch:
    """`with ClientWatch(request, answer):` closes the answer when its client goes, and at the end in any case.

    `keep` leaves it open beyond the block: for a stream, which closes it itself.
    """

    def __init__(self, request: Request, answer: Closeable) -> None:
        self._request = request
        self._answer = answer
        self._kept = False

    def __enter__(self) -> ClientWatch:
        self._task = asyncio.create_task(self._watch())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
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
