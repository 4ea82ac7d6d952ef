"""ASGI middleware around vLLM's own server: request ids, API keys and the access log, as in the arena's other servers.

Named last on vLLM's command line, so that it is the outermost. From the outside in:

| | vLLM alone | here |
|---|---|---|
| request id | any `X-Request-Id` is taken | a valid one is taken; every answer has one |
| API key | for `/v1` and few others: `/invocations` generates without | for all but health and metrics |
| body | of any size, awaited for ever | at most as large as the other servers take it, else 413; if it stops, 408 |
| memory at `/metrics` | of the API's process | of all of the server's processes too |
| log | uvicorn's access log | one line per completion, as the arena's other servers write it |
| errors | objects, but for FastAPI's own; of a too long prompt with its status as code | objects, with OpenAI's code |

What HTTP doesn't show comes from the answer's own `usage`, and with the blend from the request report. It needs
nothing of the connector, and serves stock vLLM as well.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs

from kvarena.asgi import error_body, route_path
from kvarena.engines.base import TOKEN_COUNTS
from kvarena.engines.vllm.config import CONNECTOR, CONTENDER_VARIABLE
from kvarena.engines.vllm.messages import report_log, wait_for_report
from kvarena.server.errors import CONTEXT_LENGTH_EXCEEDED
from kvarena.server.log import CLIENT_GONE, figures, log_refusal, log_request, write_to_standard_output
from kvarena.server.metrics import ServerMemory
from kvarena.server.middleware import (
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    LogLinesMiddleware,
    RequestIdMiddleware,
    max_body_bytes,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class _API:
    """Where the answers of an API say what a line has.

    `id_prefix`: what vLLM puts before a request's id to make the answer's; `None`: it makes one of its own. `finish`:
    the last match is the answer's, and `finishes` has the line's word for it where that is another. `first_token`: how
    the first event of a stream with a token begins.
    """

    id_prefix: str | None
    finish: re.Pattern[bytes] = re.compile(rb'"finish_reason":"(\w+)"')
    finishes: Mapping[str, str] = field(default_factory=dict)
    first_token: re.Pattern[bytes] = re.compile(b"")


_APIS = {
    "/v1/chat/completions": _API("chatcmpl-"),
    "/v1/completions": _API("cmpl-"),
    "/v1/messages": _API(
        "chatcmpl-",
        re.compile(rb'"stop_reason":"(\w+)"'),
        {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"},
    ),
    "/v1/responses": _API(
        None,
        re.compile(rb'"service_tier":"\w+","status":"(completed|incomplete|failed|cancelled|queued)"'),  # not an item's
        {"completed": "stop", "incomplete": "length", "failed": "error", "cancelled": "abort"},
        re.compile(rb"event: response\.\w+\.delta\n"),
    ),
}
"""By path. A response that is to be made in the background is `queued` when its request ends."""
_OWN_ID = re.compile(rb'(?:event: response\.created\ndata: )?\{(?:"response":\{)?"id":"([A-Za-z0-9._:@+=~-]{1,128})"')
_USAGE = b'"usage":'
_ERRORS = (b'data: {"error"', b"event: error")
_IN_THE_LINE = ("approximate", "num_prompt_tokens", *TOKEN_COUNTS)
_NOT_IN_DETAILS = ("request_id", "contender", "misses_by_reason", "token_scores", "leans_on", *_IN_THE_LINE)


class AccessLog:
    """Goes inside of `RequestIdMiddleware`. A blend's line waits for its report, which comes just after the answer."""

    def __init__(self, app: ASGIApp, contender: str, *, has_reports: bool) -> None:
        self._app = app
        self._contender = contender
        self._has_reports = has_reports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id: str = scope["state"]["request_id"]
        api = _APIS.get(route_path(scope)) if scope["method"] == "POST" else None
        seen = _SeenResponse(api, request_id)
        if seen.answer_id:
            report_log.forget(seen.answer_id)  # an earlier request had the same id

        async def watched(message: Message) -> None:
            seen.note(message)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            seen.fail()
            raise
        finally:
            if api is not None:
                await self._log_completion(request_id, seen)
            elif seen.is_refused and (seen.status, scope["method"]) != (404, "GET"):  # clients look what there is
                log_refusal(self._contender, scope, seen.status)

    async def _log_completion(self, request_id: str, seen: _SeenResponse) -> None:
        has_report = self._has_reports and seen.answer_id and not seen.is_refused
        report = await wait_for_report(seen.answer_id) if has_report else None
        fields = {"id": seen.answer_id, "finish": seen.finish, **_counts(seen.usage, report)}
        if seen.ttft_ms is not None:
            fields["ttft_ms"] = seen.ttft_ms
        fields["total_ms"] = seen.total_ms
        if report:
            fields["misses"] = report["misses_by_reason"]
            fields["details"] = figures({k: v for k, v in report.items() if k not in _NOT_IN_DETAILS})
        log_request(self._contender, request_id, seen.status, fields)


class _SeenResponse:
    """The part of a response that has been sent so far; it is read where it completes, by an `api`. `ttft_ms` is that
    of a stream.
    """

    def __init__(self, api: _API | None, request_id: str) -> None:
        self._api = api
        self.answer_id = "" if api is None or api.id_prefix is None else api.id_prefix + request_id
        self.usage: Mapping[str, Any] = {}
        self.ttft_ms: float | None = None
        self.total_ms = 0.0
        self._answered = 0
        self._is_whole = False
        self._reason = ""
        self._started_s = time.perf_counter()

    def note(self, message: Message) -> None:
        self.total_ms = 1e3 * (time.perf_counter() - self._started_s)
        if message["type"] == "http.response.start":
            self._answered = message["status"]
        elif message["type"] == "http.response.body":
            self._is_whole = not message.get("more_body", False)
            if self._api is not None:
                self._read(self._api, message.get("body", b""))

    def fail(self) -> None:
        """The server failed before it answered, or instead of going on."""
        self._answered, self._is_whole = 500, True

    @property
    def is_refused(self) -> bool:
        return self._answered >= 400

    @property
    def status(self) -> int:
        return CLIENT_GONE if self.finish == "abort" else self._answered

    @property
    def finish(self) -> str:
        """When the client disconnects, vLLM stops mid-stream or sends a body without a finish reason."""
        if self.is_refused:
            return "error" if self._answered >= 500 else "refused"
        return self._reason if self._is_whole and self._reason else "abort"

    def _read(self, api: _API, body: bytes) -> None:
        """Usage and finish reason are looked for as bytes: in a JSON string their quotes would be escaped."""
        if not self._is_whole and self.ttft_ms is None and api.first_token.match(body):
            self.ttft_ms = self.total_ms
        if not self.answer_id and (own_id := _OWN_ID.match(body)):
            self.answer_id = own_id[1].decode()
        if reasons := api.finish.findall(body):
            reason = reasons[-1].decode()
            self._reason = api.finishes.get(reason, reason)
        if body.startswith(_ERRORS):
            self._reason = "error"
        if (at := body.rfind(_USAGE + b"{")) >= 0:
            self.usage, _ = json.JSONDecoder().raw_decode(body[at + len(_USAGE) :].decode())


def _counts(usage: Mapping[str, Any], report: Mapping[str, Any] | None) -> dict[str, object]:
    """Prompt counts come from the report if there is one. vLLM sends usage in a stream only on request."""
    usage = _in_openais_words(usage)
    generated = {"num_generated_tokens": usage["completion_tokens"]} if "completion_tokens" in usage else {}
    if report:
        return {name: report[name] for name in _IN_THE_LINE} | generated
    if "prompt_tokens" not in usage:
        return {}
    num_prompt_tokens = usage["prompt_tokens"]
    reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    counts = {
        "num_reused_tokens": reused,
        "num_recomputed_tokens": 0,
        "num_computed_tokens": num_prompt_tokens - reused,
    }
    return {"approximate": False, "num_prompt_tokens": num_prompt_tokens, **counts, **generated}


def _in_openais_words(usage: Mapping[str, Any]) -> Mapping[str, Any]:
    """As completions have it. Responses have other names; messages too, and count cached tokens by themselves."""
    if "output_tokens" not in usage:
        return usage
    cached = usage.get("cache_read_input_tokens") or 0
    num_prompt_tokens = usage["input_tokens"] + cached + (usage.get("cache_creation_input_tokens") or 0)
    details = usage.get("input_tokens_details") or {"cached_tokens": cached}
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": usage["output_tokens"],
        "prompt_tokens_details": details,
    }


_TOO_LONG = b"""{"error":{"message":"This model's maximum context length is"""


class OpenAIErrors:
    """Makes error objects of what FastAPI refuses before vLLM sees it (`{"detail": ...}`), and gives a prompt that is
    too long the code by which OpenAI's clients know it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []

        async def coded(message: Message) -> None:
            if not held and message.get("status", 200) < 400:
                await send(message)
                return
            held.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                start, *parts = held
                held.clear()
                body = _as_error(start["status"], b"".join(part.get("body", b"") for part in parts))
                MutableHeaders(scope=start)["content-length"] = str(len(body))
                await send(start)
                await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, coded)


def _as_error(status: int, body: bytes) -> bytes:
    if body.startswith(b'{"detail":'):
        return json.dumps(error_body(status, str(json.loads(body)["detail"]))).encode()
    if body.startswith(_TOO_LONG):
        refusal = json.loads(body)
        refusal["error"]["code"] = CONTEXT_LENGTH_EXCEEDED
        return json.dumps(refusal).encode()
    return body


class AccessMiddleware:
    """The keys are vLLM's own: those of `--api-key`, else `VLLM_API_KEY`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._layers: ASGIApp | None = None
        write_to_standard_output()
        _register_memory()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._layers = self._layers or _wrapped(self._app, scope)
        await self._layers(scope, receive, send)


@cache
def _register_memory() -> None:
    """At vLLM's own `/metrics`, once in a process."""
    REGISTRY.register(ServerMemory())


def _wrapped(app: ASGIApp, scope: Scope) -> ASGIApp:
    """vLLM's settings are on `app.state`, which middleware first sees with a request."""
    state = scope["app"].state
    contender = os.environ.get(CONTENDER_VARIABLE) or "vllm"
    max_bytes = max_body_bytes(state.vllm_config.model_config.max_model_len)
    logged = AccessLog(OpenAIErrors(app), contender, has_reports=_blends(state.vllm_config))
    limited: ASGIApp = LogLinesMiddleware(BodyLimitMiddleware(logged, contender, max_bytes))
    api_keys = [key for key in state.args.api_key or [envs.VLLM_API_KEY] if key]
    return RequestIdMiddleware(ApiKeyMiddleware(limited, contender, api_keys) if api_keys else limited)


def _blends(vllm_config: VllmConfig) -> bool:
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR
