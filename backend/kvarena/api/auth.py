"""ASGI middleware: where a key is set, everything but health and metrics asks for it as a bearer token."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kvarena.api.errors import error_body

OPEN_PATHS = frozenset({"/health", "/metrics"})


class ApiKeyCheck:
    """Answers 401 before the body is read. Keys are compared in a time that doesn't depend on how much is right."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        body = error_body(401, "a valid API key is needed: Authorization: Bearer <key>")
        await JSONResponse(body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(key.strip().encode("latin-1"), self._expected)
