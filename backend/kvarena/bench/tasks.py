"""`kvarena bench tasks`: how long Sim-LLM searches for a similar task, and how often it finds one, by their number.

Tasks come in clusters, like questions on the same texts; a query is a kept task's embedding with noise, at a given
cosine. CPU time, which is that of all cores together, is measured beside wall time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time

import torch
from rich.console import Console

from kvarena.bench.console import table_of
from kvarena.bench.results import Row, spread
from kvarena.contenders.simllm.manager import InterTaskKVManager

CLUSTER_TASKS = 20
CLUSTER_NOISE = 0.3


@dataclass(frozen=True)
class TaskSearchWorkload:
    """`similarity` is the cosine of a query and the task that it was made from."""

    num_tasks: tuple[int, ...] = (1000, 10_000, 100_000)
    embedding_dim: int = 4096
    num_queries: int = 200
    similarity: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.num_tasks or min(self.num_tasks) < 1 or self.num_queries < 1 or self.embedding_dim < 1:
            raise ValueError("a workload needs a task, a query and a dimension or more")
        if not 0 < self.similarity < 1:
            raise ValueError(f"similarity must be above 0 and below 1, not {self.similarity}")

    @property
    def num_steps(self) -> int:
        return max(self.num_tasks)


def run(workload: TaskSearchWorkload, on_step: Callable[[], None]) -> list[Row]:
    """A row for each number of tasks. `found_ratio`: of the queries, those that found a task of their cluster."""
    rng, generator = random.Random(workload.seed), torch.Generator().manual_seed(workload.seed)
    manager = InterTaskKVManager(workload.embedding_dim, max(workload.num_tasks), 0.5, device="cpu")
    asked = {size: rng.choices(range(size), k=workload.num_queries) for size in workload.num_tasks}
    wanted = {number for numbers in asked.values() for number in numbers}
    queries: dict[int, torch.Tensor] = {}
    rows, kv = [], (torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    for number in range(max(workload.num_tasks)):
        if number % CLUSTER_TASKS == 0:
            centre = torch.randn(workload.embedding_dim, generator=generator)
        embedding = centre + CLUSTER_NOISE * torch.randn(workload.embedding_dim, generator=generator)
        manager.add_task(str(number), embedding, kv)
        if number in wanted:
            queries[number] = _near(embedding, workload.similarity, generator)
        on_step()
        if number + 1 in asked:
            rows.append(_measured(manager, {number: queries[number] for number in asked[number + 1]}))
    return rows


def _measured(manager: InterTaskKVManager, queries: Mapping[int, torch.Tensor]) -> Row:
    """`queries` by the number of the task that each was made from."""
    wall_ms, cpu_ms, num_found = [], [], 0
    manager.search_similar_task(next(iter(queries.values())))  # warm-up
    for number, query in queries.items():
        wall_s, cpu_s = perf_counter(), process_time()
        found = manager.search_similar_task(query)
        wall_ms.append(1000 * (perf_counter() - wall_s))
        cpu_ms.append(1000 * (process_time() - cpu_s))
        num_found += found is not None and int(found.task_id) // CLUSTER_TASKS == number // CLUSTER_TASKS
    return {
        "num_tasks": len(manager),
        "embedding_dim": manager.embedding_dim,
        "lookup_ms": spread(wall_ms),
        "lookup_cpu_ms": spread(cpu_ms),
        "found_ratio": num_found / len(queries),
    }


def _near(embedding: torch.Tensor, similarity: float, generator: torch.Generator) -> torch.Tensor:
    """An embedding at about this cosine to another: in many dimensions noise is at a right angle to it."""
    noise = torch.randn(len(embedding), generator=generator)
    length = float(embedding.norm() / noise.norm()) * math.sqrt(1 / similarity**2 - 1)
    return embedding + length * noise


def show_rows(rows: Sequence[Row], console: Console) -> None:
    figures = {
        "tasks": "{num_tasks:,}",
        "median ms": "{lookup_ms[median]:.2f}",
        "p95 ms": "{lookup_ms[p95]:.2f}",
        "CPU ms": "{lookup_cpu_ms[median]:.2f}",
        "found": "{found_ratio:.1%}",
    }
    console.print(table_of("Search for a similar task", rows, {}, figures))
