"""What a stranger learns of a tenant's prompts: from what a server calls cached, and from the time to the first token.

In each round an owner asks a prompt under a salt of its own. Then a stranger asks it under another salt, and a new
prompt as cold as can be, in an order drawn by chance. A stranger's prompt has to look like the cold one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
import numpy as np
from scipy.stats import permutation_test

NUM_RESAMPLES = 100_000
MAX_P_VALUE = 1e-4
MAX_EFFECT = 0.3


@dataclass(frozen=True)
class Leak:
    """`effect`: by which share a stranger's prompt is faster than a cold one, in the geometric mean. `p_value`: how
    often chance alone makes it look at least as fast.
    """

    effect: float
    p_value: float

    @property
    def is_sure(self) -> bool:
        """By chance in one of 10,000 runs at most; and what is small doesn't count."""
        return self.p_value < MAX_P_VALUE and self.effect > MAX_EFFECT


def leak_in_times(strangers_s: Sequence[float], cold_s: Sequence[float]) -> Leak:
    """A permutation test: in each round, which of the two times is whose is exchanged at random.

    So what slows both down, as other work on the machine does, counts for neither.
    """
    result = permutation_test(
        (np.log(strangers_s), np.log(cold_s)),
        lambda strangers, cold, axis: (strangers - cold).mean(axis=axis),
        permutation_type="samples",
        alternative="less",
        n_resamples=NUM_RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return Leak(1 - float(np.exp(result.statistic)), float(result.pvalue))


@dataclass(frozen=True)
class Asked:
    num_cached_tokens: int
    ttft_s: float


Ask = Callable[[str, str], int]
"""Sends a prompt under a salt, for one token, and returns how many of the prompt's tokens were cached."""


def timed(ask: Ask, prompt: str, salt: str) -> Asked:
    start_s = time.perf_counter()
    return Asked(ask(prompt, salt), time.perf_counter() - start_s)


def assert_isolated(
    ask: Ask,
    prompt_of: Callable[[int], str],
    *,
    num_rounds: int,
    restart: Callable[[], object] | None = None,
) -> None:
    """`prompt_of` makes a prompt of a number: all of about one length. With `restart` the owners all ask before it."""
    rng = random.Random(0)
    if restart is not None:
        for number in range(num_rounds):
            ask(prompt_of(number), f"owner-{number}")
        restart()
    strangers: list[Asked] = []
    cold: list[Asked] = []
    for number in range(num_rounds):
        known, new = prompt_of(number), prompt_of(num_rounds + number)
        if restart is None:
            assert ask(known, f"owner-{number}") == 0
        for asked, prompt, salt in rng.sample([(strangers, known, "stranger"), (cold, new, "cold")], 2):
            asked.append(timed(ask, prompt, f"{salt}-{number}"))
        assert ask(known, f"owner-{number}") > 0, "who has the salt finds it"
    assert {asked.num_cached_tokens for asked in [*strangers, *cold]} == {0}
    leak = leak_in_times([asked.ttft_s for asked in strangers], [asked.ttft_s for asked in cold])
    assert not leak.is_sure, leak


def ask_over(http: httpx.Client, model: str) -> Ask:
    """Over the chat API, for one token. The session's name is always the same: it is the salt that counts."""

    def ask(prompt: str, salt: str) -> int:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": model, "messages": messages, "session_id": "me", "cache_salt": salt, "max_tokens": 1}
        answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
        return int((answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    return ask
