"""A contender at an OpenAI address: answers are streamed, and timed as its client sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from kvarena.bench.openai_server import NoAnswer, OpenAIServer
from kvarena.bench.quality.asking import NUM_LOGPROBS, Answer, Messages, Reuse, TokenLogprobs
from kvarena.bench.variants import Variant
from kvarena.documents import TextChunk
from kvarena.engines.vllm.config import read_model_profile
from kvarena.stack.chunk_cache import warm


class HTTPAnswerer:
    """Raises `ValueError` when nothing that speaks OpenAI's API answers at `url`."""

    def __init__(
        self, name: str, url: str, api_key: str = "", timeout_s: float = 120.0, has_logprobs: bool = True
    ) -> None:
        self.name = name
        self._has_logprobs = has_logprobs
        self._api_key = api_key
        self._server = OpenAIServer(name, url, api_key, timeout_s)
        self.is_blend = self._server.is_blend
        self.num_layers: int | None = (self._server.offer or {}).get("num_layers")
        root = Path(self._server.root or "")
        self.model_folder = root if root.is_absolute() and root.is_dir() else None
        profile = read_model_profile(str(root)) if self.model_folder else {}
        self.separator: str | None = self._server.separator or profile.get("separator")

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        if not self.is_blend:
            return
        try:
            result = warm(self._server.url, self._server.model, chunks, lambda _: on_chunk(), self._api_key)
        except httpx.HTTPError as error:
            raise NoAnswer(f"{self._server.url} stopped answering: {error}") from error
        if result.failures:
            failed = result.failures[0]
            raise NoAnswer(f"chunk {failed.name} couldn't be put into the chunk cache: {failed.reason}")

    def answer(
        self,
        messages: Messages,
        setup: Variant,
        max_tokens: int,
        full: Answer | None = None,
        compares_only: bool = False,
    ) -> Answer:
        body: dict[str, Any] = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        if self._has_logprobs:
            body |= {"logprobs": True, "top_logprobs": NUM_LOGPROBS}
        if setup.choices:
            body["kv_transfer_params"] = {"kvarena": setup.choices}
        return self._stream(body)

    def describe(self) -> dict[str, object]:
        return {"url": self._server.url, "model": self._server.model, "offer": self._server.offer}

    def close(self) -> None:
        self._server.close()

    def _stream(self, body: Mapping[str, Any]) -> Answer:
        texts: list[str] = []
        logprobs: list[TokenLogprobs] = []
        request_id, usage, finish_reason, first_s = "", None, None, 0.0
        sent_s = time.perf_counter()
        for event in self._server.events("/v1/chat/completions", body):
            request_id = event.get("id") or request_id
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                text = (choice.get("delta") or {}).get("content") or ""
                finish_reason = choice.get("finish_reason") or finish_reason
                if (text or finish_reason) and not first_s:
                    first_s = time.perf_counter()
                logprobs += _logprobs(choice)
                texts.append(text)
        if finish_reason is None:
            raise NoAnswer("the stream ended in the middle of the answer")
        ttft_ms = 1000 * (first_s - sent_s)
        return Answer("".join(texts), finish_reason == "stop", ttft_ms, self._reuse(request_id, usage), logprobs)

    def _reuse(self, request_id: str, usage: Mapping[str, Any] | None) -> Reuse | None:
        if report := self._server.report(request_id):
            return Reuse(**{name: int(report.get(name) or 0) for name in Reuse.__annotations__})
        return cached_tokens(usage) if usage else None


def cached_tokens(usage: Mapping[str, Any]) -> Reuse:
    """What a server without reports tells: the tokens of its prefix cache."""
    cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    return Reuse(int(usage["prompt_tokens"]), cached, num_prefix_tokens=cached)


def _logprobs(choice: Mapping[str, Any]) -> list[TokenLogprobs]:
    """Of the tokens of an event. Two tokens of the same text count as the likelier one."""
    found = []
    for entry in (choice.get("logprobs") or {}).get("content") or ():
        top: dict[str, float] = {}
        for one in entry.get("top_logprobs") or ():
            top[one["token"]] = max(one["logprob"], top.get(one["token"], float("-inf")))
        found.append(TokenLogprobs(entry["token"], top))
    return found
