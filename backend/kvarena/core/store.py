"""What the blend asks of a chunk store, and how it puts and fetches beside the model's work.

A store maps a chunk to its KV, a tensor `(2, L, T, H_kv * D)`: keys, rotated for the positions after the chunk's sink
(S to S + T - 1 after one of S tokens), and values. A lost, corrupt or unreachable entry is a counted miss, and no
exception. KV is read in two steps: all chunks are looked up at once; then what is held is taken, some at a time,
straight from where the store keeps it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch

from kvarena.core.devices import begin_thread
from kvarena.core.plan import Chunk

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Scores:
    """Scores of a chunk's tokens, the `mean` over `num_prompts`, fp32 `(T, 2)` (`kvarena.core.attention`)."""

    mean: torch.Tensor
    num_prompts: int

    @classmethod
    def with_one_more(cls, known: Scores | None, scores: torch.Tensor) -> Scores:
        """The last `REMEMBERED_PROMPTS` count most, so that scores follow the texts that chunks now stand beside."""
        if known is None:
            return cls(scores, 1)
        num_prompts = min(known.num_prompts + 1, REMEMBERED_PROMPTS)
        return cls(known.mean + (scores - known.mean) / num_prompts, num_prompts)


REMEMBERED_PROMPTS = 16

StoreMiss = Literal["not_stored", "store_down"]
"""Why a store gives nothing of a chunk: it doesn't have it, or it failed."""
ChunkMiss = Literal[StoreMiss, "not_scored"]
"""Why a chunk isn't there, or that it is there without the scores of its tokens."""


class Piece(NamedTuple):
    """KV of some neighbouring tokens of a chunk: the first `num_tokens` of `kv` `(2, L, t, H_kv * D)`; the rest is the
    store's own. `kv` is contiguous, so that it goes to a device in one copy.
    """

    kv: torch.Tensor
    num_tokens: int

    @classmethod
    def whole(cls, kv: torch.Tensor) -> Piece:
        return cls(kv, kv.shape[2])


Pieces = Sequence[Piece]
"""A chunk's KV, cut along its tokens."""


def joined(pieces: Pieces) -> torch.Tensor:
    """A copy of a chunk's KV `(2, L, T, H_kv * D)`."""
    return torch.cat([piece.kv[:, :, : piece.num_tokens] for piece in pieces], dim=2)


class Retrieval(Protocol):
    """Chunks that were looked up together."""

    @property
    def held(self) -> Sequence[bool]:
        """Which of them the store has, and keeps until the end."""
        ...

    @property
    def failed(self) -> bool:
        """Whether nothing is held because the store couldn't be asked."""
        ...

    def take(self, indices: Sequence[int]) -> list[Pieces | None]:
        """The KV of the chunks at these indices, None for one that is not held or was lost.

        The tensors may be the store's own memory: they are valid until the retrieval ends. Each chunk is taken once.
        May be called from another thread, even when the retrieval has ended: then all is lost.
        """
        ...

    def scores(self, index: int) -> torch.Tensor | None:
        """Of a chunk that was taken: the scores of its tokens, fp32 `(T, 2)`, if it has them."""
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


class ScoredStore(ChunkStore, Protocol):
    """A store that keeps scores of a chunk's tokens beside its KV."""

    def add_scores(self, chunk: Chunk, scores: torch.Tensor) -> bool:
        """Keep what one more prompt shows of a chunk's tokens, `(T, 2)`: the mean stays. False without an entry."""
        ...


def is_finite(kv: torch.Tensor) -> bool:
    """Whether it has neither NaN nor infinity. Both show in its extremes, in a sixteenth of the time of `isfinite`."""
    return all(bound.isfinite() for bound in kv.aminmax())


def get(store: ChunkStore, chunk: Chunk) -> torch.Tensor | None:
    """A copy of one chunk's KV."""
    with store.retrieval([chunk]) as retrieval:
        (pieces,) = retrieval.take([0])
        return None if pieces is None else joined(pieces)


@dataclass(frozen=True)
class FoundKV:
    """The retrieval of a store whose tensors outlive their entries."""

    found: Sequence[torch.Tensor | None]
    all_scores: Sequence[Scores | None] = field(default=(), kw_only=True)
    failed: bool = field(default=False, kw_only=True)

    @property
    def held(self) -> Sequence[bool]:
        return [kv is not None for kv in self.found]

    def take(self, indices: Sequence[int]) -> list[Pieces | None]:
        taken = (self.found[index] for index in indices)
        return [None if kv is None else (Piece.whole(kv),) for kv in taken]

    def scores(self, index: int) -> torch.Tensor | None:
        scores = self.all_scores[index] if self.all_scores else None
        return None if scores is None else scores.mean


Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_WAITING_BYTES = 1 << 30


def one_ahead(executor: Executor, call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`call(item)` for each item in order; while one result is used, the next is computed."""
    under_way: Future[Result] | None = None
    for item in items:
        result, under_way = under_way, executor.submit(call, item)
        if result:
            yield result.result()
    if under_way:
        yield under_way.result()


class BackgroundPuts:
    """Puts KV into a store, one chunk after the other, in a thread of its own. `device`: where the KV is."""

    def __init__(self, store: ChunkStore, device: torch.device | None = None) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "kvarena-put", begin_thread, (device,))
        self._waiting: deque[tuple[Chunk, int, Future[bool]]] = deque()

    def put(self, chunk: Chunk, kv: torch.Tensor) -> None:
        """Returns at once, unless more than `MAX_WAITING_BYTES` wait."""
        while self._num_bytes > MAX_WAITING_BYTES:
            self._waiting.popleft()[2].exception()
        self.after_puts(chunk, kv.nbytes, self._store.put, chunk, kv)

    def after_puts(self, chunk: Chunk, num_bytes: int, call: Callable[..., bool], *args: object) -> None:
        """Call the store about this chunk, once the puts before have been made."""
        self._waiting.append((chunk, num_bytes, self._thread.submit(self._call, call, *args)))

    def wait_for(self, chunks: Iterable[Chunk], timeout_s: float) -> None:
        """Return when none of these waits any more, so that the store can be asked for them, or after the time-out: a
        store may hang.
        """
        self._drop_done()
        wanted = set(chunks)
        wait([future for chunk, _, future in self._waiting if chunk in wanted], timeout_s)

    def close(self) -> None:
        """Puts what waits first."""
        self._thread.shutdown()

    def _call(self, call: Callable[..., bool], *args: object) -> bool:
        try:
            return call(*args)
        except Exception:
            logger.exception("the chunk store failed to keep a chunk")
            self._store.stats.errors += 1
            return False

    @property
    def _num_bytes(self) -> int:
        self._drop_done()
        return sum(num_bytes for _, num_bytes, _ in self._waiting)

    def _drop_done(self) -> None:
        while self._waiting and self._waiting[0][2].done():
            self._waiting.popleft()
