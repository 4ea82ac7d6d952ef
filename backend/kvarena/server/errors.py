"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}` with the status that fits.

`ApiError` is raised wherever a request is refused; the handlers turn it, and all that the framework raises, into that
object. Messages name the value and what would be accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from kvarena.asgi import error_body
from kvarena.server.log import log_refusal

_MAX_SHOWN_CHARS = 80


CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""OpenAI's code for a prompt that is too long, by which clients know that a shorter one would do."""


class ApiError(HTTPException):
    """A refusal: status, message and the request's field that is to blame. `logged`: the log has its line already.
    `code`: OpenAI's, in place of the status.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, *, logged: bool = False, code: str | None = None
    ) -> None:
        super().__init__(status, message)
        self.param = param
        self.logged = logged
        self.code = code

    def json_bytes(self) -> bytes:
        """For a stream, where it is too late for a status."""
        return json.dumps(error_body(self.status_code, self.detail, self.param, self.code)).encode()


def shown(value: object) -> str:
    """A value from a request as a message shows it: on one line, and cut where it is long."""
    try:
        return _shown(value)
    except RecursionError:  # nested nearly without end
        return "..."


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, str | list | dict) or len(value) <= _MAX_SHOWN_CHARS else _cut(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def _cut(value: Any) -> str:
    start = dict(list(value.items())[:3]) if isinstance(value, dict) else value[:_MAX_SHOWN_CHARS]
    return repr(start) + "..."


def validation_message(errors: Sequence[Mapping[str, Any]], prefix: str = "") -> tuple[str, str | None]:
    """Pydantic's errors as one sentence for each field, and the first of these fields."""
    fields: dict[str, tuple[list[str], object]] = {}
    for error in errors:
        location = [part for part in error["loc"] if part != "body"]
        name = str(location[0]) if location else ""
        messages, _ = fields.setdefault(name, ([], error.get("input")))
        path = ".".join(str(part) for part in location[1:] if not _is_union_member(part))
        messages.append((f"{path}: " if path else "") + _said(error, location))
    said = [
        f"{prefix}{name}: {_joined(messages)} (given: {shown(value)})" if name else _joined(messages)
        for name, (messages, value) in fields.items()
    ]
    first = next(iter(fields), "")
    return "; ".join(said) or "bad request", prefix + first if first else None


def _is_union_member(part: object) -> bool:
    """Whether this part of a location names a member of a union, as `str` or `list[int]`, and no key or position."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)


def _said(error: Mapping[str, Any], location: Sequence[object]) -> str:
    if not location and error["type"] == "model_attributes_type":
        return f"the body must be a JSON object, not {shown(error.get('input'))}"
    message: str = error["msg"]
    return message.removeprefix("Value error, ")


def _joined(messages: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(messages))


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_bug)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return _refuse(request, error.status_code, error.detail, error.param, logged=error.logged, code=error.code)
    message = f"{request.method} {shown(request.url.path)}: {error.detail}"
    return _refuse(request, error.status_code, message, headers=error.headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = validation_message(error.errors())
    return _refuse(request, 400, message, param, said_in_log=f"bad {param}" if param else "bad body")


async def _on_bug(request: Request, error: Exception) -> Response:
    """Whatever nobody expected. The server's own log gets the traceback, the client the id to ask about."""
    request_id = request.state.request_id
    response = _refuse(request, 500, f"internal error while serving request {request_id}")
    response.headers["x-request-id"] = request_id
    return response


def _refuse(
    request: Request,
    status: int,
    message: str,
    param: str | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    logged: bool = False,
    code: str | None = None,
    said_in_log: str | None = None,
) -> Response:
    """`said_in_log`: instead of a message that may quote a prompt."""
    if not logged:
        contender = request.app.state.server.engine.contender
        log_refusal(contender, request.scope, status, error=said_in_log or message)
    return JSONResponse(error_body(status, message, param, code), status, dict(headers or {}))
