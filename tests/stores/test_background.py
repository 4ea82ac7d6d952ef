"""What goes on beside the model: everything is fetched and put, in order, and failures reach whoever asks."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvarena.core import store as background
from kvarena.core.devices import begin_thread
from kvarena.core.plan import Chunk
from kvarena.core.store import BackgroundPuts, get, one_ahead
from kvarena.stores.lmcache import LMCacheStore
from kvarena.stores.memory import MemoryStore
from support.chunk_kv import GEOMETRY, chunk_of


class HeldStore(MemoryStore):
    """Puts nothing before it is let go."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.may_go = threading.Event()

    def put(self, chunk: Chunk, kv: torch.Tensor) -> bool:
        assert self.may_go.wait(10)
        if len(chunk) == 13:
            raise ConnectionError("store is down")
        return super().put(chunk, kv)


KV = torch.zeros(2, 1, 1, 8)


def test_one_is_under_way_while_another_is_used() -> None:
    started: list[int] = []

    def call(item: int) -> int:
        started.append(item)
        return 10 * item

    with ThreadPoolExecutor(1) as executor:
        results = one_ahead(executor, call, range(4))
        assert next(results) == 0
        executor.submit(lambda: None).result()
        assert started == [0, 1]
        assert list(results) == [10, 20, 30]
        assert list(one_ahead(executor, call, [])) == []
        with pytest.raises(ZeroDivisionError):
            list(one_ahead(executor, lambda item: 1 // item, [1, 0]))


def test_whoever_asks_for_a_chunk_waits_for_its_put_only() -> None:
    store = HeldStore()
    puts = BackgroundPuts(store)
    puts.put(chunk_of(5), KV)
    puts.wait_for([chunk_of(6)], 60)
    assert get(store, chunk_of(5)) is None
    store.may_go.set()
    puts.wait_for([chunk_of(5)], 60)
    assert get(store, chunk_of(5)) is not None


def test_a_put_that_fails_is_told_and_harms_nobody_and_closing_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    store = HeldStore()
    puts = BackgroundPuts(store)
    for num_tokens in (13, 5, 6):
        puts.put(chunk_of(num_tokens), KV)
    store.may_go.set()
    puts.wait_for([chunk_of(13)], 60)
    puts.close()
    assert [get(store, chunk_of(n)) is not None for n in (13, 5, 6)] == [False, True, True]
    assert store.stats.errors == 1
    assert "failed to keep a chunk" in caplog.text
    assert "store is down" in caplog.text


def test_only_so_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "MAX_WAITING_BYTES", KV.nbytes)
    store = HeldStore()
    puts = BackgroundPuts(store)
    puts.put(chunk_of(5), KV)
    puts.put(chunk_of(6), KV)
    threading.Timer(0.05, store.may_go.set).start()
    puts.put(chunk_of(7), KV)
    assert get(store, chunk_of(5)) is not None
    puts.close()
    assert len(store) == 3


def test_threads_run_on_all_cores_of_the_process_and_not_on_their_makers_alone() -> None:
    cores = os.sched_getaffinity(0)

    def of_a_new_thread(bound_to: int) -> set[int]:
        os.sched_setaffinity(0, {bound_to})  # as vLLM does with each of its threads
        with ThreadPoolExecutor(1) as inheriting, ThreadPoolExecutor(1, initializer=begin_thread) as spread:
            assert inheriting.submit(os.sched_getaffinity, 0).result() == {bound_to}
            return spread.submit(os.sched_getaffinity, 0).result()

    with ThreadPoolExecutor(1) as other:
        assert other.submit(of_a_new_thread, min(cores)).result() == cores


def test_threads_of_a_rank_are_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread begins on the first one, where it would also make a context of its own."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    second = torch.device("cuda", 1)
    BackgroundPuts(MemoryStore(100), second)._thread.submit(lambda: None).result()
    assert chosen == [second]
    BackgroundPuts(MemoryStore(100), torch.device("cpu"))._thread.submit(lambda: None).result()
    assert chosen == [second]
    store = LMCacheStore(GEOMETRY, "tcp://127.0.0.1:9", "http://127.0.0.1:9", device=second, timeout_s=0.1)
    store._releases.submit(lambda: None).result()
    store._tried.wait(60)
    store.close()
    assert len(chosen) >= 3, "the keeper, and the thread that releases"
