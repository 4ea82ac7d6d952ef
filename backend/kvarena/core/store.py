"""What the blend asks of a chunk store, and how it puts and fetches beside the model's work.

A store maps a chunk to its KV, a tensor `(2, L, T, H_kv * D)`: keys, rotated for positions 0 to T-1, and values.
A lost, corrupt or unreachable entry is a miss and is counted; a store never raises for it. KV is read in two steps:
look chunks up, all at once, then take what is held, some at a time, straight from where the store keeps it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from kvarena.core.plan import Chunk


@dataclass
class StoreStats:
    """Counts since the store was made, and what it keeps now. `errors` are misses and lost puts because the store
    failed. Sizes are None where they are only known elsewhere.
    """

    hits: int = 0
    misses: int = 0
    puts: int = 0
    evictions: int = 0
    errors: int = 0
    num_entries: int | None = None
    num_bytes: int | None = None


Pieces = Sequence[torch.Tensor]
"""A chunk's KV, cut along its tokens: `(2, L, t, H_kv * D)` each."""


class Retrieval(Protocol):
    """Chunks that were looked up together."""

    @property
    def held(self) -> Sequence[bool]:
        """Which of them the store has, and keeps until the end."""
        ...

    def take(self, indices: Sequence[int]) -> list[Pieces | None]:
        """The KV of the chunks at these indices, None for one that is not held or was lost.

        The tensors may be the store's own memory: they are valid until the retrieval ends. Each chunk is taken once.
        May be called from another thread, even when the retrieval has ended: then all is lost.
        """
        ...


class ChunkStore(Protocol):
    """Contract of a store. Tensors that go in or come out are not written to afterwards, by either side."""

    stats: StoreStats

    def retrieval(self, chunks: Sequence[Chunk]) -> AbstractContextManager[Retrieval]:
        """Look chunks up. A hit or a miss is counted for each, by the time all that is held has been taken."""
        ...

    def put(self, chunk: Chunk, kv: torch.Tensor) -> bool:
        """Keep the KV of a chunk; False when the store couldn't. An entry of the same chunk is replaced."""
        ...

    def clear(self) -> None: ...

    def close(self) -> None: ...


def get(store: ChunkStore, chunk: Chunk) -> torch.Tensor | None:
    """A copy of one chunk's KV."""
    with store.retrieval([chunk]) as retrieval:
        (pieces,) = retrieval.take([0])
        return None if pieces is None else torch.cat(tuple(pieces), dim=2)


@dataclass(frozen=True)
class FoundKV:
    """The retrieval of a store whose tensors outlive their entries."""

    found: Sequence[torch.Tensor | None]

    @property
    def held(self) -> Sequence[bool]:
        return [kv is not None for kv in self.found]

    def take(self, indices: Sequence[int]) -> list[Pieces | None]:
        taken = (self.found[index] for index in indices)
        return [None if kv is None else (kv,) for kv in taken]


Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_WAITING_BYTES = 1 << 30


def one_ahead(executor: Executor, call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`call(item)` for one after the other; while one result is used, the next is under way."""
    under_way: Future[Result] | None = None
    for item in items:
        result, under_way = under_way, executor.submit(call, item)
        if result:
            yield result.result()
    if under_way:
        yield under_way.result()


class BackgroundPuts:
    """Puts KV into a store one after the other, in a thread of its own. Order and outcome are the store's."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvarena-put")
        self._waiting: deque[tuple[Chunk, int, Future[bool]]] = deque()

    def put(self, chunk: Chunk, kv: torch.Tensor) -> None:
        """Returns at once, unless more than `MAX_WAITING_BYTES` wait."""
        while self._num_bytes > MAX_WAITING_BYTES:
            self._waiting.popleft()[2].exception()
        self._waiting.append((chunk, kv.nbytes, self._thread.submit(self._store.put, chunk, kv)))

    def wait_for(self, chunks: Iterable[Chunk]) -> None:
        """Returns when none of these waits any more, so that the store can be asked for them."""
        self._drop_done()
        wanted = set(chunks)
        for chunk, _, future in self._waiting:
            if chunk in wanted:
                future.exception()

    def close(self) -> None:
        """Everything that waits is put away first."""
        self._thread.shutdown()

    @property
    def _num_bytes(self) -> int:
        self._drop_done()
        return sum(num_bytes for _, num_bytes, _ in self._waiting)

    def _drop_done(self) -> None:
        while self._waiting and self._waiting[0][2].done():
            self._waiting.popleft()
