"""How close the next-token distributions along an answer come to full prefill's, on the same tokens before them.

In this process that is exact: full prefill's answer is fed to the other KV (teacher forcing), so every position can be
compared, over the whole vocabulary. A server tells the likeliest tokens along its own answer alone, which has the same
tokens before it only as far as both answers are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvarena.bench.quality.answers import Answer, TokenLogprobs

if TYPE_CHECKING:
    import torch

KLMethod = Literal["teacher_forced", "common_prefix_top20"]
_LEAST_PROBABILITY = 1e-9


@dataclass(frozen=True)
class Closeness:
    """`kl` is KL(full prefill || this) in nats, the mean over `num_tokens` positions; `first_kl` that of the first one.

    `token_agreement` is the share of full prefill's tokens at which this one's likeliest token is the same; with
    `common_prefix_top20` of those before the first other one, which is a lower bound.
    """

    kl: float
    first_kl: float
    token_agreement: float
    num_tokens: int
    method: KLMethod


def closeness(full: Answer, other: Answer) -> Closeness | None:
    """None where an answer has nothing to compare by."""
    if full.forced_logprobs is not None and other.forced_logprobs is not None:
        return _teacher_forced(full.forced_logprobs, other.forced_logprobs)
    if full.logprobs and other.logprobs:
        return _along_common_prefix(full.logprobs, other.logprobs)
    return None


def _teacher_forced(full: torch.Tensor, other: torch.Tensor) -> Closeness:
    kl = full_kl(full, other)
    agreement = (full.argmax(-1) == other.argmax(-1)).float().mean()
    return Closeness(float(kl.mean()), float(kl[0]), float(agreement), len(kl), "teacher_forced")


def _along_common_prefix(full: Sequence[TokenLogprobs], other: Sequence[TokenLogprobs]) -> Closeness:
    """The first tokens that differ have the same ones before them, so they count too."""
    pairs = list(zip(full, other, strict=False))
    num_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0].token == pair[1].token, pairs))
    kl = [top_kl(mine.top, others.top) for mine, others in pairs[: num_same + 1]]
    return Closeness(sum(kl) / len(kl), kl[0], num_same / len(full), len(kl), "common_prefix_top20")


def full_kl(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(full || other) `(T,)` in nats of log-probabilities `(T, V)`."""
    from torch.nn.functional import kl_div

    return kl_div(other, full, reduction="none", log_target=True).sum(-1).clamp(min=0)


def top_kl(full: Mapping[str, float], other: Mapping[str, float]) -> float:
    """KL(full || other) in nats over the tokens that both list, everything else as one outcome.

    Taking outcomes together can only lower the divergence, so this is a lower bound of that of all tokens.
    """
    shared = sorted(full.keys() & other.keys())
    p = [math.exp(full[token]) for token in shared]
    q = [math.exp(other[token]) for token in shared]
    pairs = zip([*p, 1 - sum(p)], [*q, 1 - sum(q)], strict=True)
    floored = [(max(a, _LEAST_PROBABILITY), max(b, _LEAST_PROBABILITY)) for a, b in pairs]
    return max(0.0, sum(a * math.log(a / b) for a, b in floored))
