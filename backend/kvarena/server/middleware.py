"""ASGI middleware: request ids, API keys, a request's log lines, the largest body. vLLM's own servers use them too, so
nothing of an engine is imported here.

Every request has an id, its client's (`X-Request-Id`) or a new one, and every answer carries it. An id that could not
stand in a path or a log line is replaced by a new one, also for whoever reads the header later. Where a key is set,
everything but health and metrics asks for it as a bearer token. A body that is too large for any prompt is answered
with 413 before anybody parses it, one that is never sent to its end with 408.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Mapping, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvarena.asgi import error_response, json_response, read_body, replayed, route_path
from kvarena.server.log import lines_of_request, log_refusal

_USABLE = re.compile(r"[A-Za-z0-9._:@+=~-]{1,128}")


class RequestIdMiddleware:
    """Leaves the id in the request's state, as `request_id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _USABLE.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        MutableHeaders(scope=scope)["x-request-id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


LOG_PATH = "/kvarena/log/"


class LogLinesMiddleware:
    """Answers `GET /kvarena/log/{X-Request-Id}` with the request's lines. Goes inside of the API key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["method"] == "GET" and (path := route_path(scope)).startswith(LOG_PATH):
            app = json_response({"lines": lines_of_request(path.removeprefix(LOG_PATH))})
        await app(scope, receive, send)


OPEN_PATHS = frozenset({"/health", "/metrics"})


class ApiKeyMiddleware:
    """Answers 401, before the body is read, to a request with none of the keys; they are compared in constant time.
    Goes inside of `RequestIdMiddleware`.
    """

    def __init__(self, app: ASGIApp, contender: str, api_keys: Sequence[str]) -> None:
        self._app = app
        self._contender = contender
        self._expected = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) in OPEN_PATHS or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        message = "a valid API key is needed: Authorization: Bearer <key>"
        answer = _refusal(scope, self._contender, 401, message, {"www-authenticate": "Bearer"})
        await answer(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1")
        matches = [secrets.compare_digest(key, expected) for expected in self._expected]
        return scheme.lower() == "bearer" and any(matches)


def max_body_bytes(max_model_len: int) -> int:
    """Room for a prompt that fills the context, and for its chunks beside it."""
    return max(4 << 20, 16 * max_model_len)


BODY_TIMEOUT_S = 60.0
"""For the next piece of a body. uvicorn itself waits for ever, with a connection and what came so far."""


class BodyLimitMiddleware:
    """Answers 413 to a larger body, by its `Content-Length` or as soon as so much has come, and 408 to one that stalls.
    Goes inside of `RequestIdMiddleware`.
    """

    def __init__(self, app: ASGIApp, contender: str, max_bytes: int) -> None:
        self._app = app
        self._contender = contender
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        is_too_large = length.isdecimal() and int(length[:20]) > self._max_bytes
        try:
            read = None if is_too_large else await read_body(receive, self._max_bytes, BODY_TIMEOUT_S)
        except TimeoutError:
            message = f"nothing of the body came for {BODY_TIMEOUT_S:g} s"
            await _refusal(scope, self._contender, 408, message, {"connection": "close"})(scope, receive, send)
            return
        if read is None:
            message = f"the body is larger than {self._max_bytes} bytes"
            await _refusal(scope, self._contender, 413, message)(scope, receive, send)
            return
        await self._app(scope, replayed(read, receive), send)


def _refusal(
    scope: Scope, contender: str, status: int, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    """With its line in the log."""
    log_refusal(contender, scope, status, error=message)
    return error_response(status, message, headers)
