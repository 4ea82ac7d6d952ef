"""Chunk KV through a real LMCache server: what went in comes out, and its death is a miss."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.store import get
from kvarena.stores import lmcache
from kvarena.stores.lmcache import KVGeometry, LMCacheStore
from support.chunk_kv import GEOMETRY, chunk_of, kv_of
from support.dashboard import missing
from support.lmcache_server import LMCacheServer

pytestmark = pytest.mark.slow


def test_what_went_in_comes_out_and_a_dead_server_has_nothing(tmp_path: Path) -> None:
    lengths = (5, 32, 33, 100)
    with LMCacheServer(tmp_path) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, retry_s=0.1)
        for length in lengths[:3]:
            assert store.put(chunk_of(length), kv_of(length))
        with store.retrieval([chunk_of(length) for length in lengths]) as retrieval:
            assert list(retrieval.held) == [True, True, True, False]
            first = retrieval.take([2, 3])
            assert first[1] is None
            others = retrieval.take([0, 1])
            for length, pieces in zip((33, 5, 32), (first[0], *others), strict=True):
                assert pieces is not None
                assert torch.equal(torch.cat(tuple(pieces), dim=2), kv_of(length))
        assert (store.stats.hits, store.stats.misses, store.stats.errors) == (3, 1, 0)
        assert retrieval.take([0]) == [None], "it has ended"

        with store.retrieval([chunk_of(33), chunk_of(32)]) as retrieval:
            (pieces,) = retrieval.take([0])
            server.kill()
            assert retrieval.take([1]) == [None]
            assert store.stats.errors == 1
            assert pieces is not None
            assert torch.equal(torch.cat(tuple(pieces), dim=2), kv_of(33)), "its memory is still there"
        assert get(store, chunk_of(33)) is None
        server.start()
        while not store.put(chunk_of(5), kv_of(5)):
            pass
        found = get(store, chunk_of(5))
        assert found is not None
        assert torch.equal(found, kv_of(5))
        assert get(store, chunk_of(33)) is None, "the new server is empty"
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
        after = num_descriptors_and_threads()
        assert store.stats.errors == num_errors + 200, "each is counted"
        assert after[0] <= before[0] + 4
        assert after[1] <= before[1] + 2
        server.start()
        wait_until(lambda: store.put(chunk_of(32), kv_of(32)))
        store.close()


def test_closing_gives_everything_back(tmp_path: Path) -> None:
    with LMCacheServer(tmp_path) as server:
        counts = []
        for _ in range(5):
            store = LMCacheStore(GEOMETRY, server.url, server.http_url)
            assert store.put(chunk_of(32), kv_of(32))
            assert get(store, chunk_of(32)) is not None
            store.close()
            gc.collect()
            counts.append(num_descriptors_and_threads())
        assert counts[-1][0] <= counts[1][0] + 2, counts
        assert counts[-1][1] <= counts[1][1] + 1, counts


def test_what_was_only_looked_up_can_be_evicted(tmp_path: Path) -> None:
    """A look-up locks what it finds; a full store of locked chunks takes nothing new."""
    with LMCacheServer(tmp_path, l1_gb=0.125) as server:
        store = LMCacheStore(WIDE, server.url, server.http_url)
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
        store = LMCacheStore(WIDE, server.url, server.http_url)
        for i in range(40):
            store.put(wide_chunk(i), WIDE_KV)
        with store.retrieval([wide_chunk(i) for i in range(40)]) as retrieval:
            assert any(retrieval.held)
            said = []
            for chunk in (wide_chunk(i) for i in range(200, 230)):
                said.append(store.put(chunk, WIDE_KV))
                assert (get(store, chunk) is not None) == said[-1]
        assert not all(said), "all the room is locked"
        store.close()


def test_a_hung_server_is_waited_for_once(tmp_path: Path) -> None:
    with LMCacheServer(tmp_path) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=2.0, retry_s=0.1)
        assert store.put(chunk_of(32), kv_of(32))
        with server.frozen():
            start = time.monotonic()
            for _ in range(50):
                assert get(store, chunk_of(32)) is None
                time.sleep(0.15)
            assert time.monotonic() - start < 30, "fifty time-outs would take 100 s"
        wait_until(lambda: get(store, chunk_of(32)) is not None)
        store.close()


def test_an_idle_store_notices_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have filled the new server by then, so that a look-up finds something that can't be taken."""
    monkeypatch.setattr(lmcache, "_PING_S", 0.2)
    with LMCacheServer(tmp_path) as server:
        idle = LMCacheStore(GEOMETRY, server.url, server.http_url, retry_s=0.1)
        assert get(idle, chunk_of(32)) is None
        server.kill()
        server.start()
        other = LMCacheStore(GEOMETRY, server.url, server.http_url)
        assert other.put(chunk_of(32), kv_of(32))
        time.sleep(2)
        assert get(idle, chunk_of(32)) is not None
        other.close()
        idle.close()


def test_an_idle_store_stays_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMCache drops registrations that are silent: after an hour, here after half a minute."""
    monkeypatch.setattr(lmcache, "_PING_S", 5.0)
    options = ["--worker-reap-timeout-seconds", "30", "--worker-registration-grace-seconds", "30"]
    with LMCacheServer(tmp_path, options=options) as server:
        store = LMCacheStore(GEOMETRY, server.url, server.http_url)
        assert store.put(chunk_of(32), kv_of(32))
        time.sleep(42)
        assert get(store, chunk_of(32)) is not None
        assert store.stats.errors == 0
        store.close()


WIDE = KVGeometry("wide", 16, 8, 64, torch.bfloat16)
WIDE_KV = torch.zeros(2, 16, 256, 512, dtype=torch.bfloat16)
"""8 MiB."""


def wide_chunk(number: int) -> Chunk:
    return Chunk(as_token_ids([number] * 256))


def num_descriptors_and_threads() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_server_counts_what_it_keeps_and_evicts_under_the_dashboards_names(tmp_path: Path) -> None:
    wide = KVGeometry("wide", 16, 8, 64, torch.bfloat16)
    kv = torch.zeros(2, 16, 1024, 512, dtype=torch.bfloat16)
    with LMCacheServer(tmp_path, l1_gb=0.25) as server:
        store = LMCacheStore(wide, server.url, server.http_url, retry_s=0.1)
        stops_by, number = time.monotonic() + 60, 0
        while (lacks := of_lmcache(server)) and time.monotonic() < stops_by:
            store.put(Chunk(as_token_ids([number := number + 1] * 1024)), kv)
        store.close()
    assert lacks == set()
    assert number * kv.nbytes > 0.25 * 2**30 / 2, "nothing was evicted before the memory was half full"


def of_lmcache(server: LMCacheServer) -> set[str]:
    exposition = httpx.get(f"{server.http_url}/metrics", trust_env=False).text
    return {metric for metric in missing(exposition) if metric.startswith("lmcache_")}
