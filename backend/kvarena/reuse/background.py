"""Work with a store that goes on beside the model's: what is asked for next, and what is put away."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from kvarena.reuse.plan import Chunk
from kvarena.reuse.store import ChunkStore

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_WAITING_BYTES = 1 << 30


def one_ahead(executor: Executor, call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`call(item)` for each in turn; while one result is used, the next is under way."""
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
