"""A contender at an OpenAI address: answers are streamed, and timed as its client sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvarena.bench.quality.asking import NUM_LOGPROBS, Asking, GreedyAnswer, Messages, NoAnswer, Reuse, TokenLogprobs
from kvarena.bench.variants import Variant, is_blend
from kvarena.client import CHAT, ClientError, StreamedAnswer, Usage, connect
from kvarena.documents import TextChunk
from kvarena.policies.params import read_model_profile
from kvarena.stack.chunk_cache import warm


class HTTPAnswerer:
    """Raises `ValueError` when nothing that speaks OpenAI's API answers at `url`."""

    def __init__(
        self, name: str, url: str, api_key: str = "", timeout_s: float = 120.0, has_logprobs: bool = True
    ) -> None:
        self.name = name
        self._has_logprobs = has_logprobs
        self._api_key = api_key
        self._client, self._server = connect(name, url, api_key, timeout_s)
        self.is_blend = is_blend(self._server)
        offer = self._server.offer or {}
        self.num_layers: int | None = offer.get("num_layers")
        self.has_seams = offer.get("seams") is True
        self.sinks: Sequence[int] = (offer["sink_tokens"],) if "sink_tokens" in offer else ()
        root = Path(self._server.root or "")
        self.model_folder = root if root.is_absolute() and root.is_dir() else None
        profile = read_model_profile(str(root)) if self.model_folder else {}
        self.separator: str | None = self._server.separator or profile.get("separator")

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        if not self.is_blend:
            return
        try:
            result = warm(self._client.url, self._server.model, chunks, lambda _: on_chunk(), self._api_key)
        except ClientError as error:
            raise NoAnswer(error.reason) from error
        if result.failures:
            failed = result.failures[0]
            raise NoAnswer(f"chunk {failed.name} couldn't be put into the chunk cache: {failed.reason}")

    def score(self, chunks: Sequence[TextChunk], separator: str, on_prompt: Callable[[int, int], None]) -> None:
        try:
            self._client.score(self._server.model, chunks, separator, on_prompt)
        except ClientError as error:
            raise NoAnswer(error.reason) from error

    def make_seams(self, chunks: Sequence[TextChunk], separator: str, on_prompt: Callable[[int, int], None]) -> None:
        try:
            self._client.make_seams(self._server.model, chunks, separator, on_prompt)
        except ClientError as error:
            raise NoAnswer(error.reason) from error

    def answer(
        self, messages: Messages, variant: Variant, asking: Asking, full: GreedyAnswer | None = None
    ) -> GreedyAnswer:
        body: dict[str, Any] = {
            "model": self._server.model,
            "messages": list(messages),
            "max_tokens": asking.max_tokens,
            "temperature": 0,
        }
        if self._has_logprobs:
            body |= {"logprobs": True, "top_logprobs": NUM_LOGPROBS}
        if variant.choices:
            body["kv_transfer_params"] = {"kvarena": variant.choices}
        try:
            streamed = self._client.stream(CHAT, body)
            reuse = self._reuse(streamed)
        except ClientError as error:
            raise NoAnswer(error.reason) from error
        logprobs = [_token_logprobs(entry) for entry in streamed.logprobs]
        return GreedyAnswer(streamed.text, streamed.finish_reason == "stop", streamed.ttft_ms, reuse, logprobs)

    def describe(self) -> dict[str, object]:
        return {"url": self._client.url, "model": self._server.model, "offer": self._server.offer}

    def close(self) -> None:
        self._client.close()

    def _reuse(self, answer: StreamedAnswer) -> Reuse | None:
        report = self._client.report(answer.request_id) if self._server.offer is not None else None
        if report:
            return Reuse.of_report(report)
        return cached_tokens(answer.usage)


def cached_tokens(usage: Usage) -> Reuse | None:
    """What a server without reports tells: the tokens of its prefix cache."""
    if usage.num_prompt_tokens is None:
        return None
    cached = usage.num_cached_tokens or 0
    return Reuse(usage.num_prompt_tokens, cached, num_prefix_tokens=cached)


def _token_logprobs(entry: Mapping[str, Any]) -> TokenLogprobs:
    """Two tokens of the same text count as the likelier one."""
    top: dict[str, float] = {}
    for one in entry.get("top_logprobs") or ():
        top[one["token"]] = max(one["logprob"], top.get(one["token"], float("-inf")))
    return TokenLogprobs(entry["token"], top)
