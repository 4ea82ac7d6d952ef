"""ASGI middleware: request ids and API keys. vLLM's own servers use both, so nothing of an engine is imported here.

Every request has an id, its client's (`X-Request-Id`) or a new one, and every answer carries it. An id that could not
stand in a path or a log line is replaced by a new one, also for whoever reads the header later. Where a key is set,
everything but health and metrics asks for it as a bearer token.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvarena.server.errors import error_body
from kvarena.server.log import log_request, path_of

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


OPEN_PATHS = frozenset({"/health", "/metrics"})


class ApiKeyMiddleware:
    """Answers 401 before the body is read, to all that show none of the keys. Goes inside of `RequestIds`.

    Keys are compared in a time that doesn't depend on how much is right.
    """

    def __init__(self, app: ASGIApp, contender: str, api_keys: Sequence[str]) -> None:
        self._app = app
        self._contender = contender
        self._expected = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        message = "a valid API key is needed: Authorization: Bearer <key>"
        fields = {"finish": "refused", "method": scope["method"], "path": path_of(scope), "error": message}
        log_request(self._contender, scope["state"]["request_id"], 401, fields)
        await JSONResponse(error_body(401, message), 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1")
        matches = [secrets.compare_digest(key, expected) for expected in self._expected]
        return scheme.lower() == "bearer" and any(matches)
