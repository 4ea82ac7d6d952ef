"""The settings of a training run; saved in the run's folder and read back when it is resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

RUNS = Path(__file__).parent / "runs"


@dataclass(frozen=True)
class Settings:
    """The run ends with `tokens` or `minutes`, whichever is used up first; stages and learning rates follow that share.

    `hold` is the share of the run after which the learning rates fall linearly to `final_rate` of their value.
    """

    tokens: int = 40_000_000
    minutes: float | None = None
    seed: int = 1
    hidden_size: int = 256
    intermediate_size: int = 320
    num_layers: int = 6
    matrix_rate: float = 6e-3
    other_rate: float = 6e-3
    warmup_steps: int = 60
    hold: float = 0.55
    final_rate: float = 0.02
    context_targets_ratio: float = 0.2
    eval_every_tokens: int = 1_500_000
    save_every_s: float = 120.0

    def share(self, num_tokens: int, elapsed_s: float) -> float:
        """How much of the run is done."""
        by_time = elapsed_s / 60 / self.minutes if self.minutes else 0.0
        return min(1.0, max(num_tokens / self.tokens, by_time))

    def rate(self, step: int, share: float) -> float:
        """The learning rates' factor."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay = 1.0 if share < self.hold else (1 - share) / (1 - self.hold)
        return warmup * max(self.final_rate, decay)

    def save(self, folder: Path) -> None:
        (folder / "settings.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Settings:
        return cls(**json.loads((folder / "settings.json").read_text()))
