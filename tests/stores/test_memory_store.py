"""The memory store keeps what it was given, within its budget, whatever happens to it."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.store import get
from kvarena.stores import memory
from kvarena.stores.memory import MemoryStore


def chunk_of(number: int, tokens: int, salt: str = "") -> Chunk:
    return Chunk(as_token_ids([number] * tokens), salt)


def kv_of(number: int, tokens: int) -> torch.Tensor:
    return torch.full((2, 2, tokens, 4), float(number))


def test_random_operations_keep_budget_and_contents() -> None:
    rng = random.Random(0)
    store = MemoryStore(budget_bytes=4000)
    model: dict[Chunk, torch.Tensor] = {}
    for _ in range(4000):
        chunk = chunk_of(rng.randrange(12), rng.randrange(1, 40), rng.choice(["", "s"]))
        if rng.random() < 0.5:
            kv = kv_of(rng.randrange(100), len(chunk))
            model[chunk] = kv
            assert store.put(chunk, kv) == (kv.nbytes <= 4000)
        elif (found := get(store, chunk)) is not None:
            assert torch.equal(found, model[chunk])
        if rng.random() < 0.002:
            store.clear()
        store.check_integrity()
    assert store.stats.evictions > 0


def test_least_recently_used_goes_first() -> None:
    a, b, c = (chunk_of(i, 10) for i in range(3))
    store = MemoryStore(budget_bytes=2 * kv_of(0, 10).nbytes)
    store.put(a, kv_of(0, 10))
    store.put(b, kv_of(1, 10))
    get(store, a)
    store.put(c, kv_of(2, 10))
    assert [get(store, x) is not None for x in (a, b, c)] == [True, False, True]


def test_a_salt_sees_only_its_own() -> None:
    store = MemoryStore(10_000)
    store.put(chunk_of(1, 8, "a"), kv_of(1, 8))
    with store.retrieval([chunk_of(1, 8, "b"), chunk_of(1, 8), chunk_of(1, 8, "a")]) as retrieval:
        assert retrieval.held == [False, False, True]
    assert store.stats.misses == 2


def test_threads_do_not_break_the_budget() -> None:
    store = MemoryStore(3000)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(500):
            number = rng.randrange(20)
            store.put(chunk_of(number, 12), kv_of(number, 12))
            found = get(store, chunk_of(number, 12))
            assert found is None or torch.equal(found, kv_of(number, 12))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.check_integrity()


def test_what_a_device_computed_is_kept_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(10_000)
    monkeypatch.setattr(memory, "to_host", lambda tensor: torch.ones(tensor.shape))
    assert store.put(chunk_of(1, 8), kv_of(1, 8).to("meta"))
    found = get(store, chunk_of(1, 8))
    assert found is not None
    assert found.device.type == "cpu"
