"""A rank's own store, used only for what every rank's store holds: a single one may lose an entry."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from kvarena.core.plan import Chunk
from kvarena.core.prefilled_model import Ranks
from kvarena.core.store import FoundKV, Pieces, Retrieval, ScoredStore, StoreStats

logger = logging.getLogger(__name__)


class TensorParallelStore:
    """A `ScoredStore`. What raises on one rank is nothing found on all of them: none may leave the others waiting."""

    def __init__(self, store: ScoredStore, ranks: Ranks) -> None:
        self._store = store
        self._ranks = ranks
        self.stats = store.stats

    @contextmanager
    def retrieval(self, chunks: Sequence[Chunk]) -> Iterator[Retrieval]:
        with ExitStack() as stack:
            try:
                own: Retrieval = stack.enter_context(self._store.retrieval(chunks))
            except Exception:
                logger.exception("the chunk store failed to look up %d chunks", len(chunks))
                self.stats.errors += 1
                own = FoundKV([None] * len(chunks), failed=True)
            *held, worked = self._ranks.all([*own.held, not own.failed])
            yield _TensorParallelRetrieval(own, self._ranks, held, not worked, self.stats)

    def put(self, chunk: Chunk, kv: torch.Tensor) -> bool:
        return self._store.put(chunk, kv)

    def add_scores(self, chunk: Chunk, scores: torch.Tensor) -> bool:
        return self._store.add_scores(chunk, scores)

    def clear(self) -> None:
        self._store.clear()

    def close(self) -> None:
        self._store.close()


@dataclass(frozen=True)
class _TensorParallelRetrieval:
    own: Retrieval
    ranks: Ranks
    held: Sequence[bool]
    failed: bool
    stats: StoreStats

    def take(self, indices: Sequence[int]) -> list[Pieces | None]:
        try:
            taken = self.own.take(indices)
        except Exception:
            logger.exception("the chunk store failed to give %d chunks", len(indices))
            self.stats.errors += 1
            taken = [None] * len(indices)
        everywhere = self.ranks.all([pieces is not None for pieces in taken])
        return [pieces if is_there else None for pieces, is_there in zip(taken, everywhere, strict=True)]

    def scores(self, index: int) -> torch.Tensor | None:
        """The mean of the ranks' scores: a rank may have lost some, and all have to choose alike."""
        own = self.own.scores(index)
        everywhere = self.ranks.all([own is not None])[0]
        if own is None or not everywhere:
            return None
        total, num_ranks = self.ranks.sum(torch.stack((own, torch.ones_like(own)))).unbind()
        return total / num_ranks
