"""Times of stages, added up in the fields of a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch:
    """For a dataclass whose fields named `*_ms` are times in milliseconds, zero at first."""

    @contextmanager
    def timed(self, *stages: str, until: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Add the time that the block takes to each of these fields. `until` returns when what the block has only
        launched has ended, too.
        """
        start_s = time.perf_counter()
        try:
            yield
            until()
        finally:
            passed_ms = 1e3 * (time.perf_counter() - start_s)
            for stage in stages:
                setattr(self, stage, getattr(self, stage) + passed_ms)

    def timed_each(self, stage: str, items: Iterator[Item]) -> Iterator[Item]:
        """Add the time until each of these items is there."""
        while True:
            with self.timed(stage):
                item = next(items, None)
            if item is None:
                return
            yield item
