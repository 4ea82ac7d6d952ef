"""Where a request's time went, as the PyTorch engines measure and report it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter


@dataclass
class Timings:
    """Milliseconds. `first_token_ms` is all that passed until the first token, whatever it was spent on. An engine's
    own stages are further fields.
    """

    tokenize_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0

    @contextmanager
    def measure(self, *names: str) -> Iterator[None]:
        """Adds the time that the block takes to each of these fields."""
        started = perf_counter()
        try:
            yield
        finally:
            passed_ms = (perf_counter() - started) * 1000
            for name in names:
                setattr(self, name, getattr(self, name) + passed_ms)

    def rounded(self) -> dict[str, float]:
        """By name, as a report has them."""
        return {name: round(value, 3) for name, value in asdict(self).items()}
