"""Chunk KV through a real LMCache server: what went in comes out, and its death is a miss."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
import torch

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.store import get
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
