"""The state of a run on disk: everything it takes to go on as if nothing had happened."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

NAME = "checkpoint.pt"


@dataclass
class Progress:
    """`stage_accuracy` is a moving average over the answers of the stage."""

    step: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0
    stage: int = 0
    stage_steps: int = 0
    stage_accuracy: float = 0.0
    evaluated_at: int = 0


def save(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress) -> None:
    """Replaces the checkpoint in one step: a run killed at any moment leaves a whole one."""
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    temporary = folder / f"{NAME}.new"
    torch.save(state, temporary)
    os.replace(temporary, folder / NAME)


def load(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], device: torch.device
) -> Progress | None:
    """Restores model and optimizers; `None` when the folder has no checkpoint."""
    path = folder / NAME
    if not path.is_file():
        return None
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])
