"""Request bodies: read under a limit and parsed strictly, before any model looks at them.

FastAPI reads a body through its request's `body` and `json`; `JsonRoute` gives it a request whose two methods refuse
what is too large (413), what isn't JSON by its header (415), and what isn't by its content (400): invalid UTF-8, lone
surrogates, NaN, nesting without end. A body that is too large is never kept, let alone parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from kvarena.api.errors import ApiError, shown


class JsonRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._check_type()
            self._body = await self._read()
        return self._body

    async def json(self) -> Any:
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body isn't valid JSON: {error}") from None

    async def _read(self) -> bytes:
        limit: int = self.app.state.server.config.max_body_bytes
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async for part in self.stream():
                body += part
                if len(body) > limit:
                    raise _too_large(limit)
        except ClientDisconnect:
            raise ApiError(400, "the client went away before its request was complete") from None
        if not body:
            raise ApiError(400, "the body is empty; it must be a JSON object")
        return bytes(body)

    def _check_type(self) -> None:
        given = self.headers.get("content-type", "")
        kind = given.partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the content type must be application/json, not {shown(given)}")


class JsonRoute(APIRoute):
    """The route class of every path that takes a body: `APIRouter(route_class=JsonRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes")
