"""How similar tasks are, the cosine of the angle between their embeddings, and the index that finds near ones.

The index is locality-sensitive hashing by random projection (Charikar, STOC 2002). A hash has one bit for each
hyperplane: the side that the embedding lies on. Two embeddings at an angle of `a` differ in a bit with probability
`a / pi`, so similar tasks lie in buckets that differ in few bits. Of the buckets that hold a task, `NUM_PROBES` are
probed, in the order of query-directed multi-probe LSH (Lv et al., VLDB 2007): least first the sum of the squared
distances from the query to the hyperplanes that lie between. Tasks in other buckets aren't compared: more hyperplanes
make smaller buckets, hence fewer candidates. These are ordered by the angle between the projections, of which the hash
is the signs. The index keeps no embedding: which of the found is nearest, `most_similar_first` says.
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
NUM_PROBES = 64
_BYTE_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # (256, 8)


class LSHIndex:
    """Keys in buckets. Not thread-safe: it belongs to one manager.

    `num_candidates` counts the keys that were found in the buckets of all searches. Raises `ValueError` for an
    embedding of another size than `embedding_dim`, or with NaN or infinity in it.
    """

    def __init__(self, embedding_dim: int, num_hyperplanes: int = 16, seed: int = 42) -> None:
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, not {embedding_dim}")
        if not 1 <= num_hyperplanes <= MAX_HYPERPLANES:
            raise ValueError(f"num_hyperplanes must be from 1 to {MAX_HYPERPLANES}, not {num_hyperplanes}")
        self.embedding_dim = embedding_dim
        self.num_hyperplanes = num_hyperplanes
        self.num_candidates = self.num_probes = 0
        """Keys that were compared, and buckets that were looked into, by all searches."""
        self._hyperplanes = np.random.default_rng(seed).standard_normal((num_hyperplanes, embedding_dim))
        self._buckets: dict[str, dict[str, npt.NDArray[np.float32]]] = {}  # by hash and key, the projection's direction
        self._hashes: dict[str, str] = {}
        self._codes: npt.NDArray[np.uint64] | None = None  # the buckets' hashes as numbers; None when they changed

    def __len__(self) -> int:
        return len(self._hashes)

    def compute_hash(self, embedding: torch.Tensor) -> str:
        """The bits of an embedding `(E,)` as a string of 0 and 1, the first hyperplane's last."""
        return self.compute_hash_batch(embedding[None])[0]

    def compute_hash_batch(self, embeddings: torch.Tensor) -> list[str]:
        """The hash of each of the embeddings `(N, E)`."""
        return [_hash_of(projected) for projected in self._project(embeddings)]

    def add(self, key: str, embedding: torch.Tensor) -> str:
        """Put a key into the bucket of its embedding `(E,)`, whose hash is returned; it leaves the one it was in."""
        projected = self._project(embedding[None])[0]
        if key in self._hashes:
            self.remove(key)
        lsh_hash = self._hashes[key] = _hash_of(projected)
        if lsh_hash not in self._buckets:
            self._buckets[lsh_hash], self._codes = {}, None
        self._buckets[lsh_hash][key] = _unit(projected)
        return lsh_hash

    def remove(self, key: str) -> None:
        lsh_hash = self._hashes.pop(key)
        del self._buckets[lsh_hash][key]
        if not self._buckets[lsh_hash]:
            del self._buckets[lsh_hash]
            self._codes = None

    def neighbours(self, embedding: torch.Tensor, max_keys: int = 128) -> list[str]:
        """At most so many keys of the buckets that are probed, in the order of their projections' angles."""
        projected = self._project(embedding[None])[0]
        hashes = list(self._buckets)
        if self._codes is None:
            self._codes = np.array([int(one, 2) for one in hashes], np.uint64)
        costs = _costs_of_differing_bits(self._codes ^ np.uint64(int(_hash_of(projected), 2)), projected**2)
        probed = [self._buckets[hashes[place]] for place in np.argsort(costs, kind="stable")[:NUM_PROBES]]
        found = {key: direction for bucket in probed for key, direction in bucket.items()}
        self.num_candidates += len(found)
        self.num_probes += len(probed)
        if not found:
            return []
        angles = np.stack(list(found.values())) @ _unit(projected)
        keys = list(found)
        return [keys[place] for place in np.argsort(-angles, kind="stable")[:max_keys]]

    def check_integrity(self) -> None:
        """Compare buckets and hashes. Raises `AssertionError`."""
        assert self._hashes == {key: one for one, bucket in self._buckets.items() for key in bucket}
        assert all(self._buckets.values()), "an empty bucket"

    def _project(self, embeddings: torch.Tensor) -> npt.NDArray[np.float64]:
        """`(N, num_hyperplanes)`, in fp64, so that no order of summing flips a bit."""
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embedding_dim:
            raise ValueError(f"an embedding must be ({self.embedding_dim},), not {tuple(embeddings.shape[1:])}")
        rows = embeddings.detach().to("cpu", torch.float64).numpy()
        if not np.isfinite(rows).all():
            raise ValueError(f"an embedding must be {self.embedding_dim} finite numbers; it has NaN or infinity")
        projected: npt.NDArray[np.float64] = rows @ self._hyperplanes.T
        return projected


def _hash_of(projected: npt.NDArray[np.float64]) -> str:
    return "".join("1" if one >= 0 else "0" for one in projected[::-1])


def _unit(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return (vector / max(float(np.linalg.norm(vector)), 1e-30)).astype(np.float32)


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
