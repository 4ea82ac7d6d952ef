"""How similar tasks are, the cosine of the angle between their embeddings, and the index that finds near ones.

The index is locality-sensitive hashing by random projection (Charikar, STOC 2002). A hash has one bit for each
hyperplane: the side that the embedding lies on. Two embeddings at an angle of `a` differ in a bit with probability
`a / pi`, so similar tasks lie in buckets that differ in few bits. Buckets are probed in the order of query-directed
multi-probe LSH (Lv et al., VLDB 2007): least first the sum of the squared distances from the query to the hyperplanes
that lie between. What they hold is ordered by the angle between the projections, of which the hash is the signs. The
index keeps no embedding: which of the found is nearest, `most_similar_first` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
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


MAX_HYPERPLANES = 64
_FIRST_CAPACITY = 256
_MAX_PROBED = 4096
_BYTE_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # (256, 8)


class LSHIndex:
    """Keys in buckets. Not thread-safe: it belongs to one manager.

    Raises `ValueError` for an embedding of another size than `embedding_dim`, or with NaN or infinity in it.
    """

    def __init__(self, embedding_dim: int, num_hyperplanes: int = 16, seed: int = 42) -> None:
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, not {embedding_dim}")
        if not 1 <= num_hyperplanes <= MAX_HYPERPLANES:
            raise ValueError(f"num_hyperplanes must be from 1 to {MAX_HYPERPLANES}, not {num_hyperplanes}")
        self.embedding_dim = embedding_dim
        self.num_hyperplanes = num_hyperplanes
        self._hyperplanes = np.random.default_rng(seed).standard_normal((num_hyperplanes, embedding_dim))
        self._weights = np.uint64(1) << np.arange(num_hyperplanes, dtype=np.uint64)
        self._codes: npt.NDArray[np.uint64] = np.zeros(_FIRST_CAPACITY, np.uint64)
        self._directions: npt.NDArray[np.float32] = np.zeros((_FIRST_CAPACITY, num_hyperplanes), np.float32)
        self._keys: list[str] = []
        self._places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def compute_hash(self, embedding: torch.Tensor) -> str:
        """The bits of an embedding `(E,)` as a string of 0 and 1, the first hyperplane's last."""
        return self.compute_hash_batch(embedding[None])[0]

    def compute_hash_batch(self, embeddings: torch.Tensor) -> list[str]:
        """The hash of each of the embeddings `(N, E)`."""
        return [self._as_text(code) for code in self._encode(self._project(embeddings))]

    def add(self, key: str, embedding: torch.Tensor) -> str:
        """Put a key into the bucket of its embedding `(E,)`, whose hash is returned; it leaves the one it was in."""
        projected = self._project(embedding[None])
        place = self._places.setdefault(key, len(self._keys))
        if place == len(self._keys):
            self._keys.append(key)
            if place == len(self._codes):
                self._codes = np.concatenate([self._codes, np.zeros_like(self._codes)])
                self._directions = np.concatenate([self._directions, np.zeros_like(self._directions)])
        self._codes[place] = self._encode(projected)[0]
        self._directions[place] = _unit(projected[0])
        return self._as_text(self._codes[place])

    def remove(self, key: str) -> None:
        """Forget a key; the last one takes its place."""
        place = self._places.pop(key)
        last = self._keys.pop()
        if last != key:
            self._keys[place] = last
            self._places[last] = place
            self._codes[place] = self._codes[len(self._keys)]
            self._directions[place] = self._directions[len(self._keys)]

    def neighbours(self, embedding: torch.Tensor, max_keys: int = 128) -> list[str]:
        """At most so many keys of the buckets that are probed first; in the order of their projections' angles."""
        projected = self._project(embedding[None])  # (1, num_hyperplanes)
        costs = _costs_of_differing_bits(self._codes[: len(self)] ^ self._encode(projected), projected[0] ** 2)
        probed = _least(costs, _MAX_PROBED)
        found = probed[_least(-(self._directions[probed] @ _unit(projected[0])), max_keys)]
        return [self._keys[place] for place in found]

    def check_integrity(self) -> None:
        """Compare keys, places and codes. Raises `AssertionError`."""
        assert len(self._keys) == len(self._places) <= len(self._codes)
        assert all(self._keys[place] == key for key, place in self._places.items())

    def _project(self, embeddings: torch.Tensor) -> npt.NDArray[np.float64]:
        """`(N, num_hyperplanes)`, in fp64, so that no order of summing flips a bit."""
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embedding_dim:
            raise ValueError(f"an embedding must be ({self.embedding_dim},), not {tuple(embeddings.shape[1:])}")
        rows = embeddings.detach().to("cpu", torch.float64).numpy()
        if not np.isfinite(rows).all():
            raise ValueError(f"an embedding must be {self.embedding_dim} finite numbers; it has NaN or infinity")
        projected: npt.NDArray[np.float64] = rows @ self._hyperplanes.T
        return projected

    def _as_text(self, code: np.uint64) -> str:
        return format(int(code), f"0{self.num_hyperplanes}b")

    def _encode(self, projected: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
        codes: npt.NDArray[np.uint64] = np.where(projected >= 0, self._weights, np.uint64(0)).sum(
            axis=1, dtype=np.uint64
        )
        return codes


def _unit(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return (vector / max(float(np.linalg.norm(vector)), 1e-30)).astype(np.float32)


def _least(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """The places of the least of these values, at most so many, in ascending order of value."""
    places = np.argpartition(values, count)[:count] if count < len(values) else np.arange(len(values))
    return places[np.argsort(values[places], kind="stable")]


def _costs_of_differing_bits(
    differing: npt.NDArray[np.uint64], bit_costs: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """For each code `(N,)` the summed costs of the bits that are set in it: one table look-up a byte."""
    code_bytes = differing.astype("<u8").view(np.uint8).reshape(-1, 8)
    padded = np.zeros(-(-len(bit_costs) // 8) * 8)
    padded[: len(bit_costs)] = bit_costs
    costs = np.zeros(len(differing), np.float32)
    for byte, byte_costs in enumerate(padded.reshape(-1, 8)):
        costs += (_BYTE_BITS @ byte_costs).astype(np.float32)[code_bytes[:, byte]]
    return costs
