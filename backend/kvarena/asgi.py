"""What our ASGI middleware has in common, in vLLM's server and in ours: a request's path, reading a body ahead, JSON
answers, errors in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


def route_path(scope: Scope) -> str:
    """As the application's routes see it: without the prefix of a proxy (`--root-path`), if that left it there."""
    path: str = scope["path"]
    root = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or status}}


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """In ASCII, so that a lone surrogate, which a request's JSON may escape, can be quoted."""
    return Response(json.dumps(content), status, headers, "application/json")


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return json_response(error_body(status, message), status, headers)


async def read_body(
    receive: Receive, max_bytes: int | None = None, timeout_s: float | None = None
) -> list[Message] | None:
    """The messages of the body, or up to the client's going away; `None` for one that is too large.

    Raises `TimeoutError` where nothing more of it comes for `timeout_s`.
    """
    messages: list[Message] = []
    num_bytes = 0
    while not messages or messages[-1].get("more_body", False):
        async with asyncio.timeout(timeout_s):
            messages.append(await receive())
        num_bytes += len(messages[-1].get("body", b""))
        if max_bytes is not None and num_bytes > max_bytes:
            return None
    return messages


def replayed(messages: Iterable[Message], receive: Receive) -> Receive:
    """A `receive` that gives these first, and then whatever comes from the client (its going away)."""
    ahead = iter(messages)

    async def replay() -> Message:
        return next(ahead, None) or await receive()

    return replay
