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


ID_PREFIXES = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}
"""What vLLM puts before a request's id to make the answer's."""
_USAGE = b'"usage":'
_FINISH = re.compile(rb'"finish_reason":"(\w+)"')
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
        path = route_path(scope)
        completes = scope["method"] == "POST" and path in ID_PREFIXES
        answer_id = ID_PREFIXES[path] + request_id if completes else ""
        if completes:
            report_log.forget(answer_id)  # an earlier request had the same id
        seen = _SeenResponse()

        async def watched(message: Message) -> None:
            seen.note(message)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            seen.fail()
            raise
        finally:
            if completes:
                await self._log_completion(request_id, answer_id, seen)
            elif seen.is_refused and (seen.status, scope["method"]) != (404, "GET"):  # clients look what there is
                log_refusal(self._contender, scope, seen.status)

    async def _log_completion(self, request_id: str, answer_id: str, seen: _SeenResponse) -> None:
        report = await wait_for_report(answer_id) if self._has_reports and not seen.is_refused else None
        fields = {"id": answer_id, "finish": seen.finish, **_counts(seen.usage, report)}
        if seen.ttft_ms is not None:
            fields["ttft_ms"] = seen.ttft_ms
        fields["total_ms"] = seen.total_ms
        if report:
            fields["misses"] = report["misses_by_reason"]
            fields["details"] = figures({k: v for k, v in report.items() if k not in _NOT_IN_DETAILS})
        log_request(self._contender, request_id, seen.status, fields)


class _SeenResponse:
    """The part of a response that has been sent so far. `ttft_ms` is that of a stream."""

    def __init__(self) -> None:
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
            if not self._is_whole and self.ttft_ms is None:
                self.ttft_ms = self.total_ms
            self._read(message.get("body", b""))

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

    def _read(self, body: bytes) -> None:
        """Usage and finish reason are looked for as bytes: in a JSON string their quotes would be escaped."""
        if reasons := _FINISH.findall(body):
            self._reason = reasons[-1].decode()
        if body.startswith(b'data: {"error"'):
            self._reason = "error"
        if (at := body.rfind(_USAGE + b"{")) >= 0:
            self.usage, _ = json.JSONDecoder().raw_decode(body[at + len(_USAGE) :].decode())


def _counts(usage: Mapping[str, Any], report: Mapping[str, Any] | None) -> dict[str, object]:
    """Prompt counts come from the report if there is one. vLLM sends usage in a stream only on request."""
    generated = {"num_generated_tokens": usage["completion_tokens"]} if usage else {}
    if report:
        return {name: report[name] for name in _IN_THE_LINE} | generated
    if not usage:
        return {}
    num_prompt_tokens = usage["prompt_tokens"]
    reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    counts = {
        "num_reused_tokens": reused,
        "num_recomputed_tokens": 0,
        "num_computed_tokens": num_prompt_tokens - reused,
    }
    return {"approximate": False, "num_prompt_tokens": num_prompt_tokens, **counts, **generated}


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
