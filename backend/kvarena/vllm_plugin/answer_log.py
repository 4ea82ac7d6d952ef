"""ASGI middleware: the log's line for each completion of vLLM's server, and for what it refuses.

What HTTP doesn't show comes from the answer's own `usage`, and with the blend from the request report.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvarena.api.report_log import TOKEN_COUNTS
from kvarena.api.request_log import CLIENT_GONE, figures, log_request, path_of
from kvarena.vllm_plugin.reports import report_log, wait_for_report

ID_PREFIXES = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}
"""What vLLM puts before a request's id to make the answer's."""
_USAGE = b'"usage":'
_FINISH = re.compile(rb'"finish_reason":"(\w+)"')
_IN_THE_LINE = ("approximate", "num_prompt_tokens", *TOKEN_COUNTS)
_NOT_IN_DETAILS = ("request_id", "contender", *_IN_THE_LINE)


class AnswerLog:
    """Goes inside of `RequestIds`. A blend's line waits for its report, which follows the answer by a moment."""

    def __init__(self, app: ASGIApp, contender: str, *, has_reports: bool) -> None:
        self._app = app
        self._contender = contender
        self._has_reports = has_reports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id: str = scope["state"]["request_id"]
        completes = scope["method"] == "POST" and scope["path"] in ID_PREFIXES
        answer_id = ID_PREFIXES[scope["path"]] + request_id if completes else ""
        if completes:
            report_log.forget(answer_id)  # an earlier request had the same id
        seen = _Seen()

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
            elif seen.is_refused and not (
                seen.status == 404 and scope["method"] == "GET"
            ):  # clients look what there is
                fields = {"finish": seen.finish, "method": scope["method"], "path": path_of(scope)}
                log_request(self._contender, request_id, seen.status, fields)

    async def _log_completion(self, request_id: str, answer_id: str, seen: _Seen) -> None:
        report = await wait_for_report(answer_id) if self._has_reports and not seen.is_refused else None
        fields = {"id": answer_id, "finish": seen.finish, **_counts(seen.usage, report)}
        if seen.ttft_ms is not None:
            fields["ttft_ms"] = seen.ttft_ms
        fields["total_ms"] = seen.total_ms
        if report:
            fields["details"] = figures({k: v for k, v in report.items() if k not in _NOT_IN_DETAILS})
        log_request(self._contender, request_id, seen.status, fields)


class _Seen:
    """What of an answer has passed. `ttft_ms` is that of a stream."""

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
        """vLLM leaves off where its client has gone: in the middle, or with an answer that holds none."""
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
    """Of the prompt by the report, where there is one; vLLM tells them of streams only where they are asked for."""
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
