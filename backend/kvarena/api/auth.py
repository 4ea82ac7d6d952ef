"""ASGI middleware: where a key is set, everything but health and metrics asks for it as a bearer token."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kvarena.api.errors import error_body
from kvarena.api.request_log import log_request, path_of

OPEN_PATHS = frozenset({"/health", "/metrics"})


class ApiKeyCheck:
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
