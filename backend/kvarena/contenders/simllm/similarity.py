"""How similar tasks are, the cosine of the angle between their embeddings; the index that finds near ones; and how
similar a task has to be to lend its KV.

**The index** is locality-sensitive hashing by random projection (Charikar, STOC 2002). A hash has one bit for each
hyperplane: the side that the embedding lies on. Two embeddings at an angle of `a` differ in a bit with probability
`a / pi`, so similar tasks lie in buckets that differ in few bits. Of the buckets that hold a task, `NUM_PROBES` are
probed, in the order of query-directed multi-probe LSH (Lv et al., VLDB 2007): least first the sum of the squared
distances from the query to the hyperplanes that lie between. Tasks in other buckets aren't compared: more hyperplanes
make smaller buckets, hence fewer candidates. These are ordered by the angle between the projections, of which the hash
is the signs. The index keeps no embedding: which of the found is nearest, `most_similar_first` says.

**The threshold** is a number, or follows from measured agreement. `AutoThreshold` compares some requests with full
prefill: on a sample of those that found a task, hits and near misses alike, the first token over the reused KV is set
beside the first token of full prefill, which answers such a request. The threshold is the lowest similarity for which,
at a confidence, reuse at or above it agrees often enough: the lower bound of E. B. Wilson's score interval ("Probable
inference, the law of succession, and statistical inference", JASA 22, 1927), one-sided; and the samples nearest above
it have to agree as often. Since near misses are compared without their reuse being used, it can go down as well as up.
"""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kvarena.contenders.simllm.params import AUTO, AutoThresholdParams, SimilarityThreshold, checked_threshold

Counts = int | npt.NDArray[np.int64]

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


_DECIMALS = 6


@dataclass(frozen=True)
class AgreementSample:
    """Whether reuse of a task of this similarity gave the first token of full prefill."""

    similarity: float
    agrees: bool


class Threshold:
    """One that stays as it is. Tasks at least `value` similar are reused, none where it is infinite; those at least
    `lowest` are looked for.
    """

    def __init__(self, value: float, lowest: float) -> None:
        self.value = value
        self.lowest = lowest

    def draws_check(self) -> bool:
        """Whether to compare the next request with full prefill, should it find a task."""
        return False

    def record(self, sample: AgreementSample) -> None:
        """What was drawn before the threshold was fixed changes nothing."""

    def reset(self) -> None: ...

    def get_statistics(self) -> dict[str, Any] | None:
        return None


class AutoThreshold(Threshold):
    """Thread-safe; the same samples in the same order, with the same seed, give the same threshold.

    Until there are as many samples as an agreement without exception needs, every request is compared.
    """

    def __init__(self, params: AutoThresholdParams) -> None:
        super().__init__(params.initial_threshold, params.lowest_threshold)
        self.params = params
        self._lock = threading.Lock()
        self.reset()

    def draws_check(self) -> bool:
        with self._lock:
            if len(self._samples) < self.params.num_samples_needed:
                return True
            return self._random.random() < self.params.sample_ratio

    def record(self, sample: AgreementSample) -> None:
        with self._lock:
            self._samples.append(replace(sample, similarity=round(sample.similarity, _DECIMALS)))
            self.value = chosen_threshold(self._samples, self.params)

    def reset(self) -> None:
        with self._lock:
            self._samples: deque[AgreementSample] = deque(maxlen=self.params.max_samples)
            self._random = random.Random(self.params.seed)
            self.value = self.params.initial_threshold

    def get_statistics(self) -> dict[str, Any]:
        """What was chosen and why: `agreement` is measured at or above the threshold, `agreement_bound` is its lower
        bound; both are None without samples there. When nothing is reused the threshold is None, and they are those of
        all samples.
        """
        with self._lock:
            lowest = finite_or_none(self.value)
            above = [sample.agrees for sample in self._samples if lowest is None or sample.similarity >= lowest]
            bound = float(wilson_lower_bound(sum(above), len(above), self.params.z)) if above else None
            return {
                "threshold": lowest,
                "target_agreement": self.params.target_agreement,
                "confidence": self.params.confidence,
                "num_samples": len(self._samples),
                "num_samples_above": len(above),
                "agreement": sum(above) / len(above) if above else None,
                "agreement_bound": bound,
            }


def threshold_of(setting: SimilarityThreshold, auto: AutoThresholdParams) -> Threshold:
    """Raises `ValueError` for what is neither a cosine similarity nor "auto"."""
    if setting == AUTO:
        return AutoThreshold(auto)
    value = checked_threshold(setting)
    return Threshold(value, value)


def chosen_threshold(samples: Sequence[AgreementSample], params: AutoThresholdParams) -> float:
    """The lowest similarity of a sample that agrees, at or above which the bound of agreement reaches the target, as
    does the agreement of the `num_nearest` samples next above it: many that agree don't hide a few that don't.

    Without one it is the initial threshold; infinite where even the most similar samples fall short of the target.
    """
    if not samples:
        return params.initial_threshold
    ordered = sorted(samples, key=lambda sample: sample.similarity, reverse=True)
    similarities = np.array([sample.similarity for sample in ordered])
    agrees = np.array([sample.agrees for sample in ordered])
    num_above = np.arange(1, len(ordered) + 1)
    num_agreeing = agrees.cumsum()
    num_nearest = np.minimum(num_above, params.num_nearest)
    agreeing_further_up = np.append(np.zeros(params.num_nearest, int), num_agreeing)[: len(ordered)]
    bounds = wilson_lower_bound(num_agreeing, num_above, params.z)
    agreement_nearby = (num_agreeing - agreeing_further_up) / num_nearest
    ends_a_tie = np.append(similarities[1:] < similarities[:-1], True)
    reaching = similarities[ends_a_tie & (np.minimum(bounds, agreement_nearby) >= params.target_agreement)]
    if len(reaching):
        return float(similarities[agrees & (similarities >= reaching[-1])][-1])
    falls_short = agrees[: params.num_nearest].mean() < params.target_agreement
    return math.inf if falls_short else params.initial_threshold


def wilson_lower_bound(num_agreeing: Counts, num_samples: Counts, z: float) -> npt.NDArray[np.float64]:
    """The lower end of Wilson's score interval for shares of `num_samples` from 1; `z` is the normal quantile."""
    share = np.asarray(num_agreeing) / num_samples
    spread = z * np.sqrt(share * (1 - share) / num_samples + z**2 / (4 * np.square(num_samples)))
    bound: npt.NDArray[np.float64] = (share + z**2 / (2 * num_samples) - spread) / (1 + z**2 / num_samples)
    return bound


def finite_or_none(threshold: float) -> float | None:
    return threshold if math.isfinite(threshold) else None
