"""All that can be changed about a run: its settings, which are saved in its folder and read back when it is resumed,
and its curriculum: binding people to facts first, on short rows, then references across chunks, then length.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from kvarena.synthetic_qa.facts import Category
from kvarena.synthetic_qa.town import DEFAULT_LINKS, LINKS

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


@dataclass(frozen=True)
class RowShape:
    context_tokens: int
    branch_tokens: int
    num_rows: int

    @property
    def num_tokens(self) -> int:
        return self.num_rows * (self.context_tokens + self.branch_tokens)


@dataclass(frozen=True)
class Mix:
    """What towns and questions are like. `across_weight` is how much likelier a question across chunks is asked.

    Empty `separators` means all of them, the usual one most often.
    """

    chunk_tokens: tuple[int, ...]
    num_relations: tuple[int, ...]
    links: tuple[Category, ...] = LINKS
    across_ratio: float = 0.85
    across_weight: float = 5.0
    shuffle_ratio: float = 0.2
    unanswerable_ratio: float = 0.05
    followup_ratio: float = 0.16
    separators: tuple[str, ...] = ()
    has_usual_system: bool = False
    num_wordings: int = 4


@dataclass(frozen=True)
class Stage:
    """Ends at the share `until` of the whole run, or before when the answers' accuracy is above `enough`.

    `shapes` come with their share of the stage's tokens. `context_weight` is the weight of the context's loss.
    """

    name: str
    until: float
    enough: float
    shapes: tuple[tuple[RowShape, float], ...]
    mix: Mix
    context_weight: float

    def pick_shape(self, rng: random.Random) -> RowShape:
        """Weighted so that the shapes' shares hold in tokens."""
        weights = [share / shape.num_tokens for shape, share in self.shapes]
        return rng.choices([shape for shape, _ in self.shapes], weights)[0]


FEW = RowShape(56, 56, 28)
BINDING = RowShape(112, 112, 16)
SHORT = RowShape(160, 176, 11)
MIDDLE = RowShape(256, 256, 8)
NOTES = RowShape(512, 320, 6)
LONG = RowShape(1024, 448, 4)
LONGER = RowShape(2048, 640, 2)
LONGEST = RowShape(4096, 768, 1)

STAGES = (
    Stage(
        "few",
        0.06,
        0.85,
        ((FEW, 1.0),),
        Mix((16, 20, 24), (1, 1, 2), links=(), unanswerable_ratio=0.0, followup_ratio=0.0, num_wordings=1),
        0.3,
    ),
    Stage(
        "binding",
        0.10,
        0.85,
        ((FEW, 0.3), (BINDING, 0.7)),
        Mix((20, 30, 40), (1, 2, 2), links=(), unanswerable_ratio=0.0, followup_ratio=0.0),
        0.3,
    ),
    Stage("mixed", 0.14, 0.90, ((SHORT, 1.0),), Mix((20, 30, 40), (1, 2, 3)), 0.2),
    Stage(
        "across", 0.22, 0.95, ((SHORT, 0.3), (MIDDLE, 0.7)), Mix((24, 32, 48, 64), (2, 3, 5, 8), across_weight=7.0), 0.1
    ),
    Stage("notes", 0.42, 0.97, ((MIDDLE, 0.35), (NOTES, 0.65)), Mix((32, 48, 64, 100), (3, 5, 6, 8)), 0.05),
    Stage(
        "long",
        0.72,
        0.98,
        ((MIDDLE, 0.15), (NOTES, 0.4), (LONG, 0.45)),
        Mix((48, 64, 100, 150), (3, 5, 8), links=DEFAULT_LINKS, unanswerable_ratio=0.1),
        0.05,
    ),
    Stage(
        "longer",
        1.0,
        2.0,
        ((MIDDLE, 0.1), (NOTES, 0.35), (LONG, 0.27), (LONGER, 0.24), (LONGEST, 0.04)),
        Mix((64, 100, 150, 250), (4, 6, 8), links=DEFAULT_LINKS, unanswerable_ratio=0.1),
        0.05,
    ),
)
