"""What is measured of an answer (token times, the origin of its prompt's tokens, memory), and who is asked when."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import psutil

from kvarena.client import Usage
from kvarena.engines.base import Engine, GenerationRequest, Report, Sampling

Item = TypeVar("Item")


@dataclass(frozen=True)
class TimedTokens:
    """An answer of an engine in this process, as its caller sees it. Times are of `perf_counter`, in seconds."""

    token_ids: tuple[int, ...]
    sent_s: float
    times_s: tuple[float, ...]
    """When each token came."""
    ended_s: float
    report: Report

    @property
    def first_token_ms(self) -> float:
        """Everything before the first token counts, looking up and moving KV included."""
        return 1000 * (self.times_s[0] - self.sent_s)

    @property
    def total_ms(self) -> float:
        return 1000 * (self.ended_s - self.sent_s)


def timed(engine: Engine, prompt: str | Sequence[int], max_tokens: int, **more: Any) -> TimedTokens:
    """Decodes greedily, past the end of the answer if it comes early. `more` is for the `GenerationRequest`."""
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    given = prompt if isinstance(prompt, str) else tuple(prompt)
    request = GenerationRequest(uuid.uuid4().hex, given, sampling, **more)
    token_ids, times_s = [], []
    sent_s = perf_counter()
    generation = engine.generate(request)
    for token in generation:
        times_s.append(perf_counter())
        token_ids.append(token.token_id)
    return TimedTokens(tuple(token_ids), sent_s, tuple(times_s), perf_counter(), generation.report)


def in_turn(items: Sequence[Item], number: int) -> list[Item]:
    """Another one first with each number, so that each stands in every place."""
    first = number % len(items) if items else 0
    return [*items[first:], *items[:first]]


@dataclass(frozen=True)
class Reuse:
    """Tokens of a prompt by origin; the rest was computed as usual. Those of a prefix cache are among the reused.

    `unscored_chunks`: chunks without the scores that the policy reads, so that it fell back to doing without.
    """

    num_prompt_tokens: int
    num_reused_tokens: int
    num_recomputed_tokens: int = 0
    num_prefix_tokens: int = 0
    unscored_chunks: int = 0

    @property
    def is_mostly_cached(self) -> bool:
        """Most of the prompt was in the server's own prefix cache, as when it was asked before."""
        return 2 * self.num_prefix_tokens > self.num_prompt_tokens

    @classmethod
    def read(cls, report: Mapping[str, Any] | None, usage: Usage) -> Reuse | None:
        """By a server's request report, or else by its `usage`, which has the tokens of the prefix cache; None where
        neither says.
        """
        if report:
            return cls(**{name: int(report.get(name) or 0) for name in cls.__annotations__})
        if usage.num_prompt_tokens is None:
            return None
        cached = usage.num_cached_tokens or 0
        return cls(usage.num_prompt_tokens, cached, num_prefix_tokens=cached)


CLEAR_PEAK = "5"
"""Makes Linux forget the peak so far (proc(5), `/proc/[pid]/clear_refs`)."""


class PeakMemory:
    """Peak of the resident memory of a process (by default this one), or of it and all it has started.

    For several processes it is the sum of their peaks, which is at least the peak of their sum. Linux counts, so
    nothing runs meanwhile that could disturb a measurement. Figures are None where the count can't be reset.
    """

    def __init__(self, pid: int | None = None, with_children: bool = False) -> None:
        self._pid, self._with_children = pid or os.getpid(), with_children
        self._pids: Sequence[int] = ()
        self.before_bytes: int | None = None
        """Resident when `start` was called."""

    def start(self) -> None:
        self._pids, self.before_bytes = (), None
        with contextlib.suppress(OSError, psutil.Error):
            root = psutil.Process(self._pid)
            found = [root, *(root.children(recursive=True) if self._with_children else ())]
            for process in found:
                (Path("/proc") / str(process.pid) / "clear_refs").write_text(CLEAR_PEAK)
            before = sum(process.memory_info().rss for process in found)
            self._pids, self.before_bytes = [process.pid for process in found], before

    def peak_bytes(self) -> int | None:
        """The highest point since `start`."""
        peaks = [peak for pid in self._pids if (peak := _peak_bytes(pid))]
        return sum(peaks) if peaks else None

    def rise_bytes(self) -> int | None:
        """From `start` to the highest point since."""
        peak = self.peak_bytes()
        return None if peak is None or self.before_bytes is None else max(0, peak - self.before_bytes)


def _peak_bytes(pid: int) -> int:
    """0 for a process that is gone."""
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
