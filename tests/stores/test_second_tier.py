"""LMCache's second tier, with real servers: what one machine stored the other one finds, and its loss is a miss."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvarena.core.store import get
from kvarena.stack.lmcache_l2 import l2_adapter
from kvarena.stores.lmcache import LMCacheStore
from support.chunk_kv import GEOMETRY, chunk_of, kv_of
from support.lmcache_server import LMCacheServer
from support.redis_server import running_redis

pytestmark = pytest.mark.slow


def store_over(server: LMCacheServer) -> LMCacheStore:
    return LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0, retry_s=0.1)


def holds(store: LMCacheStore, num_tokens: int) -> bool:
    """Whether it has just what was put."""
    found = get(store, chunk_of(num_tokens))
    return found is not None and torch.equal(found, kv_of(num_tokens))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_two_servers_share_what_lies_in_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RESP_PASSWORD", "secret")
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    with running_redis(tmp_path, "secret") as redis:
        l2 = l2_adapter(redis.url, 0.0, tmp_path)
        with LMCacheServer(folders[0], l2) as one, LMCacheServer(folders[1], l2) as other:
            first, second = store_over(one), store_over(other)
            assert first.put(chunk_of(33), kv_of(33))
            wait_until(lambda: redis.num_keys() == 2)
            assert holds(second, 33)
            assert get(second, chunk_of(64)) is None

            one.kill()
            one.start()
            assert holds(first, 33), "the restart is noticed, and costs no miss"
            assert first.stats.errors == 0

            redis.kill()
            assert holds(second, 33), "its own memory has it too"
            assert get(second, chunk_of(65)) is None
            assert second.put(chunk_of(66), kv_of(66))
            assert holds(second, 66)
            first.close()
            second.close()


def test_a_folder_survives_the_servers_restart(tmp_path: Path) -> None:
    l2 = l2_adapter("kept", 1.0, tmp_path)
    with LMCacheServer(tmp_path, l2) as server:
        store = store_over(server)
        assert store.put(chunk_of(100), kv_of(100))
        wait_until(lambda: len(list((tmp_path / "kept").rglob("*"))) >= 4)
        server.kill()
        server.start()
        assert holds(store, 100)
        assert get(store, chunk_of(99)) is None
        store.close()
