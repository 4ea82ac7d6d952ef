"""A contender behind an OpenAI address: answers are streamed, and timed as its client sees them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from kvarena.bench.quality.answers import NUM_LOGPROBS, Answer, Messages, NoAnswer, Reuse
from kvarena.bench.quality.setups import Setup
from kvarena.context import TextChunk
from kvarena.stack.warm import error_message, warm
from kvarena.vllm_plugin.config import read_model_profile

REPORT_DELAYS_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
CONNECT_TIMEOUT_S = 5.0


class HTTPAnswerer:
    """Raises `ValueError` when nothing that speaks OpenAI's API answers at `url`."""

    def __init__(
        self, name: str, url: str, api_key: str = "", timeout_s: float = 120.0, has_logprobs: bool = True
    ) -> None:
        self.name, self.url = name, url.removesuffix("/").removesuffix("/v1")
        self._has_logprobs = has_logprobs
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
        )
        try:
            model = self._http.get("/v1/models").raise_for_status().json()["data"][0]
            offer = self._http.get("/kvarena")
            self._offer: dict[str, Any] | None = offer.json() if offer.is_success else None
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{name}: no OpenAI server answers at {self.url} ({error})") from error
        self.model: str = model["id"]
        self.is_blend = bool(self._offer and self._offer.get("contender") == "blend")
        offered = self._offer or {}
        self.num_layers: int | None = offered.get("num_layers")
        root = Path(model.get("root") or "")
        self.model_folder = root if root.is_absolute() and root.is_dir() else None
        profile = read_model_profile(str(root)) if self.model_folder else {}
        self.separator: str | None = offered.get("separator") or profile.get("separator")

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        if not self.is_blend:
            return
        try:
            result = warm(self.url, self.model, chunks, lambda _: on_chunk())
        except httpx.HTTPError as error:
            raise NoAnswer(f"{self.url} stopped answering: {error}") from error
        if result.failures:
            failed = result.failures[0]
            raise NoAnswer(f"chunk {failed.name} couldn't be put into the chunk cache: {failed.reason}")

    def answer(self, messages: Messages, setup: Setup, max_tokens: int) -> Answer:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._has_logprobs:
            body |= {"logprobs": True, "top_logprobs": NUM_LOGPROBS}
        if setup.choices:
            body["kv_transfer_params"] = {"kvarena": setup.choices}
        try:
            return self._stream(body)
        except httpx.HTTPError as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from error

    def describe(self) -> dict[str, object]:
        return {"url": self.url, "model": self.model, "offer": self._offer}

    def close(self) -> None:
        self._http.close()

    def _stream(self, body: Mapping[str, Any]) -> Answer:
        texts: list[str] = []
        request_id, usage, finish_reason, first_s, logprobs = "", None, None, 0.0, None
        sent_s = time.perf_counter()
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise NoAnswer(error_message(response))
            for event in _events(response):
                request_id = event.get("id") or request_id
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    text = (choice.get("delta") or {}).get("content") or ""
                    finish_reason = choice.get("finish_reason") or finish_reason
                    if (text or finish_reason) and not first_s:
                        first_s = time.perf_counter()
                    logprobs = logprobs or _first_logprobs(choice)
                    texts.append(text)
        if finish_reason is None:
            raise NoAnswer("the stream ended in the middle of the answer")
        ttft_ms = 1000 * (first_s - sent_s)
        return Answer("".join(texts), finish_reason == "stop", ttft_ms, self._reuse(request_id, usage), logprobs)

    def _reuse(self, request_id: str, usage: Mapping[str, Any] | None) -> Reuse | None:
        if self._offer is not None and (report := self._report(request_id)):
            return Reuse(**{name: int(report.get(name) or 0) for name in Reuse.__annotations__})
        if not usage:
            return None
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Reuse(int(usage["prompt_tokens"]), int(cached), num_prefix_tokens=int(cached))

    def _report(self, request_id: str) -> dict[str, Any] | None:
        """The request report, which may come a moment after the stream's end."""
        for delay_s in REPORT_DELAYS_S:
            time.sleep(delay_s)
            reply = self._http.get(f"/kvarena/requests/{request_id}")
            if reply.is_success:
                report: dict[str, Any] = reply.json()
                return report
        return None


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        try:
            event = json.loads(data)
        except json.JSONDecodeError as error:
            raise NoAnswer(f"the server sent something that is no JSON: {data[:200]}") from error
        if event.get("error"):
            raise NoAnswer(str(event["error"].get("message") or event["error"]))
        yield event


def _first_logprobs(choice: Mapping[str, Any]) -> dict[str, float] | None:
    """Of the answer's first token. Two tokens of the same text count as the likelier one."""
    content = (choice.get("logprobs") or {}).get("content") or ()
    if not content:
        return None
    found: dict[str, float] = {}
    for entry in content[0].get("top_logprobs") or ():
        found[entry["token"]] = max(entry["logprob"], found.get(entry["token"], float("-inf")))
    return found
