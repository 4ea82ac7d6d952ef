"""Chunk KV through a real LMCache server: what went in comes out, and its death is a miss."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.store import get, joined
from kvarena.stores import lmcache
from kvarena.stores.lmcache import KVGeometry, LMCacheStore
from kvarena.stores.lmcache_context import AtServer, LMCacheContext, Lookup
from support.chunk_kv import GEOMETRY, chunk_of, kv_of
from support.dashboard import missing
from support.lmcache_server import LMCacheServer
from support.waiting import wait_until

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class IdleStore:
    store: LMCacheStore
    since_s: float


@pytest.fixture(scope="module", autouse=True)
def idle_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IdleStore]:
    """It is left alone until the last test, while the others run."""
    options = ["--worker-reap-timeout-seconds", "30", "--worker-registration-grace-seconds", "30"]
    with LMCacheServer(tmp_path_factory.mktemp("idle"), l1_gb=0.125, options=options) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0)
        assert store.put(chunk_of(32), kv_of(32))
        yield IdleStore(store, time.monotonic())
        store.close()


def test_what_went_in_comes_out_and_a_dead_server_has_nothing(tmp_path: Path) -> None:
    lengths = (5, 32, 33, 100)
    with LMCacheServer(tmp_path) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0, retry_s=0.1)
        for length in lengths[:3]:
            assert store.put(chunk_of(length), kv_of(length))
        with store.retrieval([chunk_of(length) for length in lengths]) as retrieval:
            assert list(retrieval.held) == [True, True, True, False]
            first = retrieval.take([2, 3])
            assert first[1] is None
            others = retrieval.take([0, 1])
            for length, pieces in zip((33, 5, 32), (first[0], *others), strict=True):
                assert pieces is not None
                assert torch.equal(joined(pieces), kv_of(length))
                assert all(piece.kv.is_contiguous() for piece in pieces), "a GPU takes each in one copy"
        assert (store.stats.hits, store.stats.misses, store.stats.errors) == (3, 1, 0)
        assert retrieval.take([0]) == [None], "it has ended"
        store._releases.submit(lambda: None).result()

        with store.retrieval([chunk_of(33), chunk_of(32)]) as retrieval:
            (pieces,) = retrieval.take([0])
            server.kill()
            assert retrieval.take([1]) == [None]
            assert store.stats.errors == 1
            assert pieces is not None
            assert torch.equal(joined(pieces), kv_of(33)), "its memory is still there"
        assert get(store, chunk_of(33)) is None
        server.start()
        while not store.put(chunk_of(5), kv_of(5)):
            pass
        found = get(store, chunk_of(5))
        assert found is not None
        assert torch.equal(found, kv_of(5))
        assert get(store, chunk_of(33)) is None, "the new server is empty"
        store.close()


def test_a_server_with_lmcaches_own_blend_module_serves_us_as_any_other(tmp_path: Path) -> None:
    """That module hooks into transfers by CUDA IPC; ours are others."""
    with LMCacheServer(tmp_path, options=["--engine-type", "blend"]) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0)
        wait_until(lambda: store.put(chunk_of(100), kv_of(100)))
        found = get(store, chunk_of(100))
        assert found is not None
        assert torch.equal(found, kv_of(100))
        assert get(store, chunk_of(99)) is None
        store.close()


def test_an_outage_costs_no_descriptors_and_no_threads(tmp_path: Path) -> None:
    """Each failed attempt to connect used to keep eight descriptors and two threads."""
    with LMCacheServer(tmp_path) as server:
        url, http_url = server.url, server.http_url
        store = LMCacheStore(GEOMETRY, url, http_url, retry_s=0.01)
        assert store.put(chunk_of(32), kv_of(32))
        server.kill()
        assert get(store, chunk_of(32)) is None
        time.sleep(1)
        before = num_descriptors_and_threads()
        num_errors = store.stats.errors
        for _ in range(200):
            assert get(store, chunk_of(32)) is None
            time.sleep(0.02)
        assert store.stats.errors == num_errors + 200, "each is counted"

        def is_no_more() -> bool:
            num_descriptors, num_threads = num_descriptors_and_threads()
            return num_descriptors <= before[0] + 4 and num_threads <= before[1] + 2

        wait_until(is_no_more)  # an attempt that is under way has its own until it ends
        server.start()
        wait_until(lambda: store.put(chunk_of(32), kv_of(32)))
        store.close()


def test_a_request_doesnt_wait_while_others_wait_for_a_server_that_hangs(tmp_path: Path) -> None:
    """A put may be at several time-outs, one after the other."""
    with LMCacheServer(tmp_path) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0)
        assert store.put(chunk_of(32), kv_of(32))
        taken, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            with store._lock:
                taken.set()
                go_on.wait(60)

        other = threading.Thread(target=hold)
        other.start()
        taken.wait(60)
        num_errors = store.stats.errors
        assert get(store, chunk_of(32)) is None, "with the lock held for as long as this takes"
        assert store.stats.errors == num_errors + 1
        go_on.set()
        other.join()
        wait_until(lambda: get(store, chunk_of(32)) is not None)
        store.close()


def test_closing_gives_everything_back(tmp_path: Path) -> None:
    with LMCacheServer(tmp_path) as server:
        counts = []
        for _ in range(5):
            store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0)
            assert store.put(chunk_of(32), kv_of(32))
            assert get(store, chunk_of(32)) is not None
            store.close()
            gc.collect()
            counts.append(num_descriptors_and_threads())
        most = counts[1][0] + 2, counts[1][1] + 1
        wait_until(lambda: all(now <= limit for now, limit in zip(num_descriptors_and_threads(), most, strict=True)))


def test_kv_of_another_sink_is_a_miss(tmp_path: Path) -> None:
    ids = as_token_ids(range(32))
    sinks = [as_token_ids(sink) for sink in ([], [1], [2], [1, 2])]
    with LMCacheServer(tmp_path) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0)
        for number, sink in enumerate(sinks):
            chunk = Chunk(ids, "", sink)
            assert get(store, chunk) is None
            kv = torch.full_like(kv_of(32), number)
            assert store.put(chunk, kv)
        for number, sink in enumerate(sinks):
            found = get(store, Chunk(ids, "", sink))
            assert found is not None
            assert (found == number).all()
        store.close()


def test_scores_are_kept_with_the_kv_and_come_back_with_it(tmp_path: Path) -> None:
    def scores_of(store: LMCacheStore, length: int) -> torch.Tensor | None:
        with store.retrieval([chunk_of(length)]) as retrieval:
            (pieces,) = retrieval.take([0])
            assert pieces is not None
            assert torch.equal(joined(pieces), kv_of(length))
            return retrieval.scores(0)

    with LMCacheServer(tmp_path) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0, retry_s=0.1)
        assert not store.add_scores(chunk_of(100), torch.ones(100, 2)), "there is no such chunk"
        assert store.put(chunk_of(100), kv_of(100))
        assert scores_of(store, 100) is None
        first, second = (torch.rand(100, 2) + 0.01 for _ in range(2))
        assert store.add_scores(chunk_of(100), first)
        found = scores_of(store, 100)
        assert found is not None
        torch.testing.assert_close(found, first, rtol=0.05, atol=0)
        assert store.add_scores(chunk_of(100), second)
        other = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0, retry_s=0.1)
        found = scores_of(other, 100)
        assert found is not None
        torch.testing.assert_close(found, (first + second) / 2, rtol=0.1, atol=0)

        assert store.put(chunk_of(33), kv_of(33))
        with other.retrieval([chunk_of(33)]) as retrieval:
            retrieval.take([0])
            assert not store.add_scores(chunk_of(33), first[:33]), "somebody reads it"
        assert scores_of(store, 33) is None
        assert store.stats.errors == 0
        server.kill()
        assert not store.add_scores(chunk_of(100), first)
        other.close()
        store.close()


def test_a_chunk_that_is_lost_by_its_scores_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others took its room between its deletion and its second put."""
    with LMCacheServer(tmp_path) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0, retry_s=0.1)
        wait_until(lambda: store.put(chunk_of(100), kv_of(100)))
        num_errors = store.stats.errors
        monkeypatch.setattr(LMCacheContext, "store", lambda *args, **options: None)
        assert not store.add_scores(chunk_of(100), torch.ones(100, 2))
        assert store.stats.errors == num_errors + 1
        monkeypatch.undo()
        assert get(store, chunk_of(100)) is None
        assert store.put(chunk_of(100), kv_of(100))
        store.close()


def test_what_was_only_looked_up_can_be_evicted(tmp_path: Path) -> None:
    """A look-up locks what it finds; a full store of locked chunks takes nothing new."""
    with LMCacheServer(tmp_path, l1_gb=0.125) as server:
        store = LMCacheStore(WIDE, server.url, server.http_url, timeout_s=5.0)
        old, new = [wide_chunk(i) for i in range(24)], [wide_chunk(i) for i in range(100, 130)]
        for chunk in old:
            store.put(chunk, WIDE_KV)
        for _ in range(3):
            with store.retrieval(old) as retrieval:
                assert any(retrieval.held)
        for chunk in new:
            wait_until(lambda chunk=chunk: store.put(chunk, WIDE_KV))  # type: ignore[misc]
            assert get(store, chunk) is not None, "a put that says True is true"
        assert store.stats.errors == 0
        store.close()


def test_a_put_without_room_says_no(tmp_path: Path) -> None:
    with LMCacheServer(tmp_path, l1_gb=0.125) as server:
        store = LMCacheStore(WIDE, server.url, server.http_url, timeout_s=5.0)
        for i in range(40):
            store.put(wide_chunk(i), WIDE_KV)
        with store.retrieval([wide_chunk(i) for i in range(40)]) as retrieval:
            assert any(retrieval.held)
            said = []
            for chunk in (wide_chunk(i) for i in range(200, 230)):
                said.append(store.put(chunk, WIDE_KV))
                assert said[-1] or get(store, chunk) is None
        assert not all(said), "all the room is locked"
        store.close()


def test_a_hung_server_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    look_up = LMCacheContext.look_up

    def counted(context: LMCacheContext, chunks: Sequence[Chunk], at_server: AtServer) -> list[Lookup]:
        asked.append(len(chunks))
        return look_up(context, chunks, at_server)

    with LMCacheServer(tmp_path) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=2.0, retry_s=0.1)
        wait_until(lambda: store.put(chunk_of(32), kv_of(32)))
        monkeypatch.setattr(LMCacheContext, "look_up", counted)
        with server.frozen():
            for _ in range(50):
                assert get(store, chunk_of(32)) is None
                time.sleep(0.15)
            assert asked == [1], "and not fifty times"
        wait_until(lambda: get(store, chunk_of(32)) is not None)
        store.close()


def test_a_server_that_hung_keeps_no_locks(tmp_path: Path) -> None:
    """What it is asked while it hangs it does all at once afterwards, in no order; what it locks then is freed."""
    chunks = [chunk_of(length) for length in range(32, 96)]
    with LMCacheServer(tmp_path) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=1.0, retry_s=0.1)
        for chunk in chunks:
            wait_until(partial(store.put, chunk, kv_of(len(chunk))))
        for number in range(4):
            with ThreadPoolExecutor(1) as asking:
                asked = asking.submit(take_often, store, chunks)
                time.sleep(0.05 * number)
                with server.frozen():
                    time.sleep(2)
                asked.result()
            wait_until(lambda: get(store, chunks[0]) is not None)
        wait_until(lambda: num_locked(server) == 0)
        assert store.stats.errors
        store.close()


def take_often(store: LMCacheStore, chunks: Sequence[Chunk]) -> None:
    for _ in range(60):
        with store.retrieval(chunks) as retrieval:
            retrieval.take(range(0, len(chunks), 3))


def num_locked(server: LMCacheServer) -> int:
    status = httpx.get(f"{server.http_url}/status").json()
    return int(status["storage_manager"]["l1_manager"]["read_locked_count"])


def test_an_idle_store_notices_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have filled the new server by then, so that a look-up finds something that can't be taken."""
    monkeypatch.setattr(lmcache, "_PING_S", 0.2)
    with LMCacheServer(tmp_path) as server:
        idle = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0, retry_s=0.1)
        assert get(idle, chunk_of(32)) is None
        before = idle._context
        server.kill()
        server.start()
        other = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0)
        assert other.put(chunk_of(32), kv_of(32))
        wait_until(lambda: idle._context not in (before, None))
        assert get(idle, chunk_of(32)) is not None
        other.close()
        idle.close()


WIDE = KVGeometry("wide", 16, 8, 64, torch.bfloat16)
WIDE_KV = torch.zeros(2, 16, 256, 512, dtype=torch.bfloat16)
"""8 MiB."""


def wide_chunk(number: int) -> Chunk:
    return Chunk(as_token_ids([number] * 256))


def num_descriptors_and_threads() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_the_server_counts_what_it_keeps_and_evicts_under_the_dashboards_names(tmp_path: Path) -> None:
    wide = KVGeometry("wide", 16, 8, 64, torch.bfloat16)
    kv = torch.zeros(2, 16, 1024, 512, dtype=torch.bfloat16)
    with LMCacheServer(tmp_path, l1_gb=0.25) as server:
        store = LMCacheStore(wide, server.url, server.http_url, timeout_s=5.0, retry_s=0.1)
        stops_by, number = time.monotonic() + 60, 0
        while (lacks := of_lmcache(server)) and time.monotonic() < stops_by:
            store.put(Chunk(as_token_ids([number := number + 1] * 1024)), kv)
        store.close()
    assert lacks == set()
    assert number * kv.nbytes > 0.25 * 2**30 / 2, "nothing was evicted before the memory was half full"


def of_lmcache(server: LMCacheServer) -> set[str]:
    exposition = httpx.get(f"{server.http_url}/metrics", trust_env=False).text
    return {metric for metric in missing(exposition) if metric.startswith("lmcache_")}


def test_an_idle_store_stays_registered(idle_store: IdleStore) -> None:
    """LMCache drops registrations that are silent: after an hour, here after half a minute."""
    time.sleep(max(0.0, idle_store.since_s + 42 - time.monotonic()))
    assert get(idle_store.store, chunk_of(32)) is not None
    assert idle_store.store.stats.errors == 0
