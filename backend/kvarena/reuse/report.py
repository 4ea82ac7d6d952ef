"""What one blend did, and how long each of its stages took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


@dataclass
class BlendReport:
    """Tokens by origin, store look-ups by outcome, milliseconds by stage.

    `fetch_ms` is the waiting for the store, `select_ms` ends when the tokens to recompute are known. `store_errors` and
    `store_evictions` are those since the last report, for chunks are put into the store beside the blend; its size is
    None where it isn't known here. `blend_failures` is 1 where the blend itself failed, and the whole range was
    computed. `ratio` is the one that the policy was given, None where it came to none.
    """

    ratio: float | None = None
    num_reused_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_computed_tokens: int = 0
    store_hits: int = 0
    store_misses: int = 0
    store_errors: int = 0
    store_evictions: int = 0
    store_entries: int | None = None
    store_bytes: int | None = None
    blend_failures: int = 0
    fetch_ms: float = 0.0
    prefill_chunks_ms: float = 0.0
    move_ms: float = 0.0
    write_ms: float = 0.0
    select_ms: float = 0.0
    recompute_ms: float = 0.0
    blend_ms: float = 0.0
    spans: list[tuple[int, int]] = field(default_factory=list)

    def timed_each(self, stage: str, items: Iterator[Item]) -> Iterator[Item]:
        """The time until each of these is there."""
        while True:
            with self.timed(stage):
                item = next(items, None)
            if item is None:
                return
            yield item

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + 1e3 * (time.perf_counter() - start))
