"""Several ranks with a store each: what one of them lacks, none of them uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.store import FoundKV
from kvarena.stores.memory import MemoryStore
from kvarena.stores.tensor_parallel import TensorParallelStore
from support.thread_ranks import ThreadRanks

CHUNKS = [Chunk(as_token_ids([number] * 4)) for number in range(4)]


class RaisingStore(MemoryStore):
    @contextmanager
    def retrieval(self, chunks: Sequence[Chunk]) -> Iterator[FoundKV]:
        raise ConnectionError("store is down")
        yield


def asked(stores: Sequence[MemoryStore]) -> list[tuple[list[bool], list[bool]]]:
    """What each rank finds of `CHUNKS`: what is held, and what came of taking all of them."""
    ranks = ThreadRanks(len(stores))

    def ask(store: MemoryStore) -> tuple[list[bool], list[bool]]:
        with TensorParallelStore(store, ranks).retrieval(CHUNKS) as retrieval:
            taken = retrieval.take(range(len(CHUNKS)))
            return list(retrieval.held), [pieces is not None for pieces in taken]

    with ThreadPoolExecutor(len(stores)) as executor:
        return list(executor.map(ask, stores))


def store_of(numbers: Sequence[int], make: Callable[[int], MemoryStore] = MemoryStore) -> MemoryStore:
    store = make(1 << 20)
    for number in numbers:
        store.put(CHUNKS[number], torch.zeros(2, 1, 4, 8))
    return store


def test_only_what_all_have_is_held_and_taken() -> None:
    both = [False, True, True, False]
    assert asked([store_of([0, 1, 2]), store_of([1, 2, 3])]) == [(both, both)] * 2


def test_a_store_that_raises_on_one_rank_leaves_nobody_waiting() -> None:
    raising = store_of([0, 1, 2, 3], RaisingStore)
    nothing = [False] * 4
    assert asked([store_of([0, 1, 2, 3]), raising]) == [(nothing, nothing)] * 2
    assert raising.stats.errors == 1


def test_scores_are_the_ranks_mean_and_none_where_one_has_none() -> None:
    ranks, stores = ThreadRanks(2), [store_of([0, 1]), store_of([0, 1])]
    for number, store in enumerate(stores):
        assert store.add_scores(CHUNKS[0], torch.full((4, 2), float(number)))
    assert stores[1].add_scores(CHUNKS[1], torch.ones(4, 2))

    def ask(store: MemoryStore) -> list[torch.Tensor | None]:
        with TensorParallelStore(store, ranks).retrieval(CHUNKS[:2]) as retrieval:
            retrieval.take([0, 1])
            return [retrieval.scores(0), retrieval.scores(1)]

    with ThreadPoolExecutor(2) as executor:
        for first, second in executor.map(ask, stores):
            assert first is not None
            assert first.tolist() == [[0.5, 0.5]] * 4
            assert second is None
