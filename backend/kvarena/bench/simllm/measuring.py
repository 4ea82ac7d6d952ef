"""One benchmark: the same contenders and the same kind of stream on a shape, for speed, and on a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvarena.bench.quality.questions import Exam
from kvarena.bench.results import Row
from kvarena.bench.shapes import model_folder
from kvarena.bench.simllm.contenders import Network, Setup, best_dtype
from kvarena.bench.simllm.rows import answer_rows, make_rows
from kvarena.bench.simllm.running import Asking, run_stream
from kvarena.bench.simllm.stream import make_stream
from kvarena.vllm_plugin.config import BlendConfig, read_blend_profile


@dataclass(frozen=True)
class Measured:
    """Rows of the contenders, and of their single answers."""

    rows: list[Row]
    answers: list[Row]


@dataclass(frozen=True)
class Bench:
    """`max_new_tokens` are generated for every answer. `dtype` None is the machine's best."""

    exam: Exam
    setups: Sequence[Setup]
    similar_ratio: float
    max_new_tokens: int = 8
    max_cache_size: int = 100
    dtype: str | None = None
    seed: int = 0

    def speed(self, shape: str, num_tasks: int, on_step: Callable[[], None]) -> Measured:
        """On random weights. Raises `ValueError` for an unknown shape."""
        torch.manual_seed(self.seed)
        network = Network.load(model_folder(None, shape), shape, dtype=self.dtype or best_dtype(), random=True)
        separator = BlendConfig(**read_blend_profile(model_folder(None, None))).separator
        return self._measure(network, num_tasks, separator, on_step)

    def quality(self, model: str | None, num_tasks: int, on_step: Callable[[], None]) -> Measured:
        """On a trained model, by default the town model."""
        network = Network.find(model, dtype=self.dtype)
        return self._measure(network, num_tasks, network.config.separator, on_step)

    def settings(self) -> dict[str, Any]:
        """As they go into the result file."""
        return {
            "similar_ratio": self.similar_ratio,
            "max_new_tokens": self.max_new_tokens,
            "max_cache_size": self.max_cache_size,
            "dtype": self.dtype or best_dtype(),
            "num_threads": torch.get_num_threads(),
            "seed": self.seed,
        }

    def _measure(self, network: Network, num_tasks: int, separator: str, on_step: Callable[[], None]) -> Measured:
        tasks = make_stream(self.exam, num_tasks, self.similar_ratio, self.seed)
        asking = Asking(self.exam.system, separator, self.max_new_tokens, self.max_cache_size)
        runs = run_stream(network, tasks, self.setups, asking, on_step)
        model = {"model": network.name, "has_random_weights": network.has_random_weights}
        return Measured(make_rows(tasks, runs, **model), answer_rows(tasks, runs, **model))
