"""LMCache's second tier, with real servers: what one machine stored the other one finds, and its loss is a miss."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from kvarena.core.plan import Chunk
from kvarena.core.store import get
from kvarena.stack.lmcache_l2 import CHUNK_FILES, l2_adapter
from kvarena.stores import lmcache, lmcache_context
from kvarena.stores.lmcache import LMCacheStore
from support.chunk_kv import GEOMETRY, chunk_of, kv_of
from support.lmcache_server import LMCacheServer
from support.redis_server import running_redis
from support.waiting import wait_until

pytestmark = pytest.mark.slow


def store_over(server: LMCacheServer) -> LMCacheStore:
    return LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0, retry_s=0.1)


def holds(store: LMCacheStore, num_tokens: int) -> bool:
    """Whether it has just what was put."""
    found = get(store, chunk_of(num_tokens))
    return found is not None and torch.equal(found, kv_of(num_tokens))


def test_two_servers_share_what_lies_in_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RESP_PASSWORD", "secret")
    monkeypatch.setattr(lmcache, "_PING_S", 600.0)
    monkeypatch.setattr(lmcache_context, "_RESTART_CHECK_S", 0.0)  # this server is back within a second
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
        written = tmp_path / "kept"
        wait_until(
            lambda: sum(path.stat().st_size for path in written.rglob("*") if path.is_file()) >= kv_of(128).nbytes
        )
        server.kill()
        server.start()
        wait_until(lambda: holds(store, 100))  # it has to connect again
        assert get(store, chunk_of(99)) is None
        store.close()


def flip_a_bit(files: list[Path]) -> None:
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    files[1].write_bytes(content)


def cut(files: list[Path]) -> None:
    files[0].write_bytes(files[0].read_bytes()[:-100])


def empty(files: list[Path]) -> None:
    files[-1].write_bytes(b"")


def lengthen(files: list[Path]) -> None:
    files[0].write_bytes(b"x" * 100 + files[0].read_bytes())


def swap(files: list[Path]) -> None:
    first, second = (path.read_bytes() for path in files[:2])
    files[0].write_bytes(second)
    files[1].write_bytes(first)


def lose(files: list[Path]) -> None:
    files[1].unlink()


def test_damaged_files_are_misses_and_are_replaced(tmp_path: Path) -> None:
    """Each damage has a chunk of its own; one chunk is left as it is."""
    damages = [flip_a_bit, cut, empty, lengthen, swap, lose]
    sound, *chunks = [Chunk(chunk_of(100).token_ids, str(number)) for number in range(len(damages) + 1)]
    kv, written = kv_of(100), tmp_path / "kept"

    def found(chunk: Chunk) -> bool:
        """What is found is right."""
        taken = get(store, chunk)
        assert taken is None or torch.equal(taken, kv)
        return taken is not None

    def is_replaced(chunk: Chunk) -> bool:
        return store.put(chunk, kv) and found(chunk)

    with LMCacheServer(tmp_path, l2_adapter("kept", 1.0, tmp_path)) as server:
        store = store_over(server)
        before: set[Path] = set()
        files: list[list[Path]] = []
        for chunk in (sound, *chunks):
            assert store.put(chunk, kv)
            wait_until(lambda: len(set(written.rglob(CHUNK_FILES)) - before) == 4)
            files.append(sorted(set(written.rglob(CHUNK_FILES)) - before))
            before.update(files[-1])
        wait_until(lambda: len({path.stat().st_size for path in before}) == 1)
        server.kill()
        for damage, own in zip(damages, files[1:], strict=True):
            damage(own)
        server.start()
        wait_until(lambda: found(sound))
        assert [found(chunk) for chunk in chunks] == [False] * len(chunks)
        for chunk in chunks:
            wait_until(partial(is_replaced, chunk))
        store.close()
