"""A contender as its client sees it: one streamed completion, or several at once, timed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kvarena.bench.memory import PeakMemory
from kvarena.bench.quality.asking import Reuse
from kvarena.bench.quality.http_answerer import cached_tokens
from kvarena.bench.variants import Variant, is_blend
from kvarena.client import COMPLETIONS, Client, ClientError, ServerInfo, Usage


@dataclass(frozen=True)
class Timed:
    """One answer. Times are in seconds of this process's clock. `reuse` is None where the server tells nothing.

    `report` is a blend's request report.
    """

    sent_s: float
    first_s: float
    ended_s: float
    num_answer_tokens: int
    reuse: Reuse | None = None
    report: Mapping[str, Any] | None = None

    @property
    def ttft_ms(self) -> float:
        return 1000 * (self.first_s - self.sent_s)

    @property
    def e2e_ms(self) -> float:
        return 1000 * (self.ended_s - self.sent_s)

    @property
    def tpot_ms(self) -> float | None:
        """Time for each token after the first; None for an answer of one."""
        more = self.num_answer_tokens - 1
        return 1000 * (self.ended_s - self.first_s) / more if more > 0 else None


@dataclass(frozen=True)
class Burst:
    """Requests that were sent at once, in the order of their prompts; one that failed is its reason.

    Memory is of the server and all its processes, before the burst and at its highest; None where it isn't known.
    """

    outcomes: Sequence[Timed | str]
    before_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def answered(self) -> list[Timed]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, Timed)]

    @property
    def requests_per_s(self) -> float | None:
        """From the first request's sending to the last one's end; None when not all were answered."""
        answered = self.answered
        if len(answered) < len(self.outcomes):
            return None
        return len(answered) / (max(one.ended_s for one in answered) - min(one.sent_s for one in answered))


class Contender:
    """`pid` is the server's process, where it runs here, and `options` are those it was started with.

    `is_told`: what its store holds is known beforehand.
    """

    def __init__(
        self,
        name: str,
        client: Client,
        server: ServerInfo,
        pid: int | None = None,
        options: Mapping[str, str] | None = None,
        is_target: bool = False,
    ) -> None:
        self.name, self.server = name, server
        self._client, self._options = client, options
        self.is_blend = is_blend(server)
        self.is_told = self.is_blend or not is_target
        self._extras: dict[str, Any] = {"ignore_eos": True} if _can_tokenize(client, server) else {}
        self._memory = PeakMemory(pid, with_children=True) if pid else None

    def ask_at_once(
        self, prompts: Sequence[Sequence[int]], variant: Variant, max_tokens: int, salt: str = "", store: str = ""
    ) -> Burst:
        """`salt` keeps a blend's chunks apart from those of other salts. `store` is its parameter of that name."""

        def ask(prompt: Sequence[int]) -> Timed | str:
            try:
                return self._ask(prompt, variant, max_tokens, salt, store)
            except ClientError as error:
                return error.reason

        if self._memory:
            self._memory.start()
        pool = ThreadPoolExecutor(len(prompts))
        try:
            outcomes = list(pool.map(ask, prompts))
        finally:
            pool.shutdown(wait=False)  # an interrupt needn't wait for answers
        if not self._memory:
            return Burst(outcomes)
        return Burst(outcomes, self._memory.before_bytes, self._memory.peak_bytes())

    def describe(self) -> dict[str, object]:
        """As it goes into the result file's settings."""
        return {
            "url": self._client.url,
            "model": self.server.model,
            "offer": self.server.offer,
            "options": self._options,
        }

    def close(self) -> None:
        self._client.close()

    def _ask(self, prompt: Sequence[int], variant: Variant, max_tokens: int, salt: str, store: str) -> Timed:
        body: dict[str, Any] = {
            "model": self.server.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            **self._extras,
        }
        if salt:
            body["cache_salt"] = salt
        if chosen := variant.choices | ({"store": store} if store else {}):
            body["kv_transfer_params"] = {"kvarena": chosen}
        answer = self._client.stream(COMPLETIONS, body)
        report = self._client.report(answer.request_id) if self.is_blend else None
        num_tokens = answer.usage.num_output_tokens or len(answer.tokens)
        reuse, first_s = _reuse(report, answer.usage), answer.tokens[0].time_s
        return Timed(answer.sent_s, first_s, answer.ended_s, num_tokens, reuse, report)


def _can_tokenize(client: Client, server: ServerInfo) -> bool:
    """Whether it has `/tokenize`, as vLLM, SGLang and our own engines have: these take `ignore_eos` too."""
    try:
        client.token_ids({"model": server.model, "prompt": "a"})
    except ClientError:
        return False
    return True


def _reuse(report: Mapping[str, Any] | None, usage: Usage) -> Reuse | None:
    if report:
        return Reuse.of_report(report)
    return cached_tokens(usage)
