"""The tasks that were processed, and the search for one that is similar to a new one.

Sim-LLM (Luo et al., NeurIPS 2025, appendix C): a task's embedding is hashed, the tasks of its bucket are compared with
it, and the most similar one above a threshold lends its KV. Here buckets that differ in few bits are searched too, and
after the tasks of this process those that it shares with others.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvarena.contenders.simllm.params import MAX_CACHE_BYTES, AutoThresholdParams, SimilarityThreshold
from kvarena.contenders.simllm.shared_tasks import SharedTasks
from kvarena.contenders.simllm.similarity import (
    ROUNDING,
    AgreementSample,
    LSHIndex,
    Threshold,
    finite_or_none,
    most_similar_first,
    threshold_of,
)
from kvarena.contenders.simllm.task import KnownTask, LayerKVShape, TaskCacheEntry, TopLayerKV, WholeKV
from kvarena.core.plan import TokenIds

logger = logging.getLogger(__name__)


def available_device(name: str) -> torch.device:
    """The device of that name, or with a `RuntimeWarning` the CPU where the machine has none of the kind.

    Raises `ValueError` for what isn't a device's name.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be a PyTorch device, as cpu, cuda or cuda:1, not {name!r}") from error
    if device.type == "cpu" or _is_there(device):
        return device
    warnings.warn(f"this machine has no {name}; using the CPU", RuntimeWarning, stacklevel=3)
    return torch.device("cpu")


def _is_there(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (
        accelerator is not None
        and accelerator.type == device.type
        and (device.index or 0) < torch.accelerator.device_count()
    )


@contextmanager
def if_possible(task_id: str) -> Iterator[None]:
    """Around `add_task`: an answer doesn't fail because its KV couldn't be kept."""
    try:
        yield
    except ValueError:
        logger.exception("the KV of task %s was not kept", task_id)


@dataclass(frozen=True)
class TaskMatch:
    """A task that was found, and the cosine of the angle between its embedding and the query's."""

    entry: TaskCacheEntry
    similarity: float


@dataclass(frozen=True, eq=False)
class TaskSearch:
    """For a query's embedding `(E,)`: a task to reuse, or one to compare with full prefill instead, or neither."""

    embedding: torch.Tensor
    match: TaskMatch | None = None
    check: TaskMatch | None = None


def _always(task: KnownTask) -> bool:
    return True


class InterTaskKVManager:
    """Keeps at most `max_cache_size` tasks and `max_cache_bytes`, the least recently used out first. Thread-safe.

    Entries don't change once they are in, and the KV of one that was found stays valid after it is evicted.
    `similarity_threshold` "auto" follows `auto`, given somebody who makes the comparisons that `search_or_check` asks
    for; the models of this package do.
    """

    def __init__(
        self,
        embedding_dim: int = 4096,
        max_cache_size: int = 100,
        similarity_threshold: SimilarityThreshold = 0.8,
        num_hyperplanes: int = 16,
        device: str = "cuda",
        auto: AutoThresholdParams | None = None,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        if max_cache_size < 1:
            raise ValueError(f"max_cache_size must be at least 1, not {max_cache_size}")
        if max_cache_bytes < 1:
            raise ValueError(f"max_cache_bytes must be at least 1, not {max_cache_bytes}")
        self.embedding_dim = embedding_dim
        self.max_cache_size = max_cache_size
        self.max_cache_bytes = max_cache_bytes
        self.num_hyperplanes = num_hyperplanes
        self.device = available_device(device)
        self._auto = auto or AutoThresholdParams()
        self._threshold = threshold_of(similarity_threshold, self._auto)
        self._kv_shape: LayerKVShape | None = None
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._shared: SharedTasks | None = None
        self._lock = threading.RLock()
        self.reset()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def similarity_threshold(self) -> float | None:
        """Tasks at least this similar are reused now. None: "auto" found that reuse doesn't agree well enough."""
        return finite_or_none(self._threshold.value)

    def set_similarity_threshold(self, threshold: SimilarityThreshold) -> None:
        """A cosine similarity, or "auto", which starts with no comparisons. Raises `ValueError` for anything else."""
        self._threshold = threshold_of(threshold, self._auto)

    def expect(self, embedding_dim: int, kv_shape: LayerKVShape, model: torch.nn.Module | None = None) -> None:
        """Tasks are a model's from now on.

        Raises `ValueError` when its embeddings or its KV don't fit what is kept, or when that is another model's.
        """
        with self._lock:
            if embedding_dim != self.embedding_dim:
                raise ValueError(
                    f"the manager's embedding_dim is {self.embedding_dim}; the model's embeddings have {embedding_dim}"
                )
            if self._entries and self._kv_shape != kv_shape:
                raise ValueError(f"the manager keeps tasks whose KV is {self._kv_shape}; the model's is {kv_shape}")
            if self._entries and model is not None and self._model is not None and self._model() is not model:
                raise ValueError("the manager keeps tasks of another model; reset forgets them")
            self._kv_shape = kv_shape
            self._model = weakref.ref(model) if model is not None else self._model

    def share(self, shared: SharedTasks) -> None:
        """Tasks are shared from now on: what is added goes there too, and what is more similar there is used.

        Raises `ValueError` when they are another model's.
        """
        task_format = shared.task_format
        layer = LayerKVShape(task_format.kv_shape.num_kv_heads, task_format.kv_shape.head_size)
        self.expect(task_format.embedding_dim, layer)
        self._shared = shared

    def search_similar_task(self, query_embedding: torch.Tensor) -> TaskCacheEntry | None:
        """The kept task most similar to an embedding `(E,)`, if it is at least the threshold."""
        match = self.search(query_embedding)
        return match.entry if match else None

    def search(
        self,
        query_embedding: torch.Tensor,
        is_usable: Callable[[KnownTask], bool] = _always,
        similarity_threshold: float | None = None,
    ) -> TaskMatch | None:
        """The most similar task that `is_usable`. Counts a hit or a miss; damaged entries are dropped on the way.

        `similarity_threshold` None is the manager's own. Raises `ValueError` for an embedding of another size, or one
        that isn't finite.
        """
        threshold = self._threshold.value if similarity_threshold is None else similarity_threshold
        return self._counted(self._find(query_embedding, is_usable, threshold))

    def search_or_check(
        self,
        query_embedding: torch.Tensor,
        is_usable: Callable[[KnownTask], bool] = _always,
        similarity_threshold: float | None = None,
    ) -> TaskSearch:
        """As `search`; but with the threshold "auto" a sample of the tasks that are found, near misses among them, is
        given out for comparison, and counts as a miss. `record_check` wants to know the outcome.
        """
        threshold = self._threshold
        if similarity_threshold is not None:
            threshold = Threshold(similarity_threshold, similarity_threshold)
        is_check = threshold.draws_check()
        found = self._find(query_embedding, is_usable, threshold.lowest if is_check else threshold.value)
        if not is_check:
            return TaskSearch(query_embedding, match=self._counted(found))
        self._counted(None)
        return TaskSearch(query_embedding, check=found)

    def record_check(self, similarity: float, agrees: bool) -> AgreementSample:
        """Whether reuse of a task that was given out for comparison would have begun as full prefill did."""
        sample = AgreementSample(similarity, agrees)
        self._threshold.record(sample)
        return sample

    def add_task(
        self,
        task_id: str,
        task_embedding: torch.Tensor,
        top_layer_kv: TopLayerKV,
        whole_kv: WholeKV | None = None,
        salt: str = "",
        token_ids: TokenIds | None = None,
    ) -> None:
        """Keep a copy of a task's KV; a task of the same id is replaced. `token_ids` say later what its prompt was.

        Raises `ValueError` naming what was expected: `(E,)` finite numbers, and KV of the shape of the first task, or
        of the model that the manager was given to.
        """
        with self._lock:
            shape = self._kv_shape or LayerKVShape.of(top_layer_kv)
            if problem := shape.problem_of(top_layer_kv):
                raise ValueError(f"top_layer_kv {problem}")
            num_tokens = top_layer_kv[0].shape[2]
            if whole_kv and not whole_kv.is_sound(num_tokens):
                raise ValueError(f"whole_kv must be (2, L, {num_tokens}, H_kv * D) and finite")
            if token_ids is not None and len(token_ids) != num_tokens:
                raise ValueError(f"token_ids must be {num_tokens}, one for each token of the KV, not {len(token_ids)}")
            entry = self._entry(task_id, task_embedding, top_layer_kv, whole_kv, salt, token_ids, time.time())
            shared_kv = self._shared.kv_of(entry) if self._shared else None
            self._kv_shape = shape
            self._insert(entry)
        if self._shared and shared_kv is not None:
            self._shared.add(entry, shared_kv)

    def get_statistics(self) -> dict[str, Any]:
        """Counts since the manager was made or reset. `num_damaged`: entries that were dropped as unusable.
        `candidates_per_search`: tasks in the buckets that a search looked into.

        `auto_threshold` says what "auto" chose and why; None with a fixed threshold. The last four have the names that
        Sim-LLM's demonstration gives to these counts.
        """
        shared = self._shared.get_statistics() if self._shared else {}
        with self._lock:
            num_searches = self._num_hits + self._num_misses
            hit_ratio = self._num_hits / num_searches if num_searches else 0.0
            return {
                "cache_size": len(self._entries),
                "max_cache_size": self.max_cache_size,
                "num_bytes": self._num_bytes,
                "max_cache_bytes": self.max_cache_bytes,
                "similarity_threshold": self.similarity_threshold,
                "num_searches": num_searches,
                "num_hits": self._num_hits,
                "num_misses": self._num_misses,
                "candidates_per_search": self._index.num_candidates / num_searches if num_searches else 0.0,
                "probes_per_search": self._index.num_probes / num_searches if num_searches else 0.0,
                "hit_ratio": hit_ratio,
                "num_evictions": self._num_evictions,
                "num_damaged": self._num_damaged,
                "auto_threshold": self._threshold.get_statistics(),
                **shared,
                "cache_hits": self._num_hits,
                "cache_misses": self._num_misses,
                "total_queries": num_searches,
                "hit_rate": hit_ratio,
            }

    def reset(self) -> None:
        """Forget all tasks and counts, shared tasks for all processes; the expected shapes stay."""
        with self._lock:
            self._threshold.reset()
            self._entries: OrderedDict[str, TaskCacheEntry] = OrderedDict()
            self._sizes: dict[str, int] = {}
            self._index = LSHIndex(self.embedding_dim, self.num_hyperplanes)
            self._num_hits = self._num_misses = self._num_evictions = self._num_damaged = 0
        if self._shared:
            self._shared.clear()

    def generate_task_id(self, input_text: str, salt: str = "") -> str:
        """The same text always gets the same id, so that it is kept once."""
        digest = hashlib.blake2b(input_text.encode("utf-8", "surrogatepass"), digest_size=12, person=b"kvarena-task")
        digest.update(b"\0" + salt.encode())
        return f"task-{digest.hexdigest()}"

    def check_integrity(self) -> None:
        """Compare index and entries. Raises `AssertionError`."""
        with self._lock:
            self._index.check_integrity()
            assert len(self._index) == len(self._entries) <= self.max_cache_size
            assert self._sizes.keys() == self._entries.keys()
            assert self._num_bytes <= self.max_cache_bytes
            for task_id, entry in self._entries.items():
                assert entry.task_id == task_id
                assert self._index.compute_hash(entry.task_embedding) == entry.lsh_hash
        if self._shared:
            self._shared.check_integrity()

    def _find(
        self, query_embedding: torch.Tensor, is_usable: Callable[[KnownTask], bool], lowest: float
    ) -> TaskMatch | None:
        """The most similar usable task, at least `lowest`, of this process or of those that share with it."""
        with self._lock:
            neighbours = [self._entries[task_id] for task_id in self._index.neighbours(query_embedding)]
            nearest = most_similar_first(query_embedding, neighbours)
            found = (TaskMatch(*near) for near in nearest if near[1] >= lowest - ROUNDING)
            match = next((match for match in found if self._serves(match.entry, is_usable)), None)
        if self._shared is None:
            return match
        above = match.similarity + ROUNDING if match else lowest - ROUNDING
        shared = self._shared.find(query_embedding, above, is_usable)
        if shared is None:
            return match
        # A shared task becomes one of this process too.
        task, similarity, top_layer_kv, whole_kv = shared
        with self._lock:
            entry = self._entry(
                task.task_id, task.task_embedding, top_layer_kv, whole_kv, task.salt, task.token_ids, task.timestamp
            )
            self._insert(entry)
        return TaskMatch(entry, similarity)

    def _entry(
        self,
        task_id: str,
        embedding: torch.Tensor,
        kv: TopLayerKV,
        whole_kv: WholeKV | None,
        salt: str,
        token_ids: TokenIds | None,
        timestamp: float,
    ) -> TaskCacheEntry:
        """With copies of the tensors."""
        return TaskCacheEntry(
            task_id,
            _own_copy(embedding, torch.device("cpu")).float(),
            self._index.compute_hash(embedding),
            (_own_copy(kv[0], self.device), _own_copy(kv[1], self.device)),
            timestamp,
            whole_kv and WholeKV(whole_kv.chunk, _own_copy(whole_kv.kv, self.device)),
            salt,
            token_ids,
        )

    def _insert(self, entry: TaskCacheEntry) -> None:
        self._entries[entry.task_id] = entry
        self._entries.move_to_end(entry.task_id)
        self._index.add(entry.task_id, entry.task_embedding)
        self._sizes[entry.task_id] = entry.num_bytes
        while len(self._entries) > self.max_cache_size or self._num_bytes > self.max_cache_bytes:
            self._drop(next(iter(self._entries)))
            self._num_evictions += 1

    @property
    def _num_bytes(self) -> int:
        return sum(self._sizes.values())

    def _counted(self, match: TaskMatch | None) -> TaskMatch | None:
        with self._lock:
            if match is None:
                self._num_misses += 1
            else:
                self._num_hits += 1
                if match.entry.task_id in self._entries:
                    self._entries.move_to_end(match.entry.task_id)
        return match

    def _serves(self, entry: TaskCacheEntry, is_usable: Callable[[KnownTask], bool]) -> bool:
        assert self._kv_shape is not None, "there are no entries before there is a shape"
        if not entry.is_sound(self._kv_shape):
            self._drop(entry.task_id)
            self._num_damaged += 1
            return False
        return is_usable(entry)

    def _drop(self, task_id: str) -> None:
        del self._entries[task_id]
        del self._sizes[task_id]
        self._index.remove(task_id)


def _own_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).to(device)
