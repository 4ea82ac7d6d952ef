"""How similar tasks are: the cosine of the angle between their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch

ROUNDING = 1e-6
"""What rounding may take from a cosine: an embedding is similar to itself at a threshold of 1."""


class HasEmbedding(Protocol):
    """`task_embedding` is `(E,)`, fp32, on the CPU."""

    @property
    def task_embedding(self) -> torch.Tensor: ...


Task = TypeVar("Task", bound=HasEmbedding)


def most_similar_first(query_embedding: torch.Tensor, tasks: Sequence[Task]) -> list[tuple[Task, float]]:
    """These tasks with their similarity to an embedding `(E,)`, from -1 to 1; 0 where one of the two is zero."""
    if not tasks:
        return []
    query = query_embedding.detach().to("cpu", torch.float32)
    embeddings = torch.stack([task.task_embedding for task in tasks])
    norms = embeddings.norm(dim=1) * query.norm()
    ordered = (embeddings @ query / norms.clamp(min=1e-30)).clamp(-1, 1).sort(descending=True, stable=True)
    return [
        (tasks[place], similarity)
        for similarity, place in zip(ordered.values.tolist(), ordered.indices.tolist(), strict=True)
    ]
