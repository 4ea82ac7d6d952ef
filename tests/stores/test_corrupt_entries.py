"""A real LMCache server whose memory is damaged, and whose calls fail in turn: a miss, counted, and nothing leaks."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import requests
import torch
from lmcache.v1.multiprocess.cache_control.key_resolver import resolve_object_keys
from lmcache.v1.multiprocess.token_hasher import TokenHasher

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.store import get, joined
from kvarena.stores import lmcache_context
from kvarena.stores.lmcache import LMCacheStore
from kvarena.stores.lmcache_context import LMCacheContext, Lookup
from support.chunk_kv import GEOMETRY, chunk_of, kv_of
from support.lmcache_server import LMCacheServer
from support.waiting import wait_until

pytestmark = pytest.mark.slow
PIECE_BYTES = 2 * 3 * 32 * 32 * 2
LENGTH = 80
"""Tokens: three pieces."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LMCacheServer]:
    with LMCacheServer(tmp_path_factory.mktemp("lmcache"), l1_gb=0.125) as server:
        yield server


@pytest.fixture
def store(server: LMCacheServer) -> Iterator[LMCacheStore]:
    store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=5.0, retry_s=0.1)
    yield store
    store.close()


class Pieces:
    """Those of one chunk, in the server's memory."""

    def __init__(self, memory: Any, kv: torch.Tensor) -> None:
        self._memory = memory
        rows = [kv[0, 0, start].view(torch.uint8).numpy().tobytes() for start in range(0, kv.shape[2], 31)]
        self.places = [memory.find(row) for row in rows]
        assert -1 not in self.places
        assert all(memory.find(row, place + 1) == -1 for row, place in zip(rows, self.places, strict=True))

    def read(self, number: int) -> bytes:
        place = self.places[number]
        return bytes(self._memory[place : place + PIECE_BYTES])

    def write(self, number: int, data: bytes, offset: int = 0) -> None:
        place = self.places[number] + offset
        self._memory[place : place + len(data)] = data


def flip_a_bit(pieces: Pieces) -> None:
    pieces.write(1, bytes([pieces.read(1)[1000] ^ 1]), 1000)


def write_no_number(pieces: Pieces) -> None:
    pieces.write(2, torch.full((4,), float("nan")).bfloat16().view(torch.uint8).numpy().tobytes(), 64)


def forget_a_piece(pieces: Pieces) -> None:
    pieces.write(0, bytes(PIECE_BYTES))


def swap_pieces(pieces: Pieces) -> None:
    first, second = pieces.read(0), pieces.read(1)
    pieces.write(0, second)
    pieces.write(1, first)


def swap_tokens(pieces: Pieces) -> None:
    data = pieces.read(1)
    pieces.write(1, data[64:128] + data[:64])


def lose_the_checksum(pieces: Pieces) -> None:
    pieces.write(0, bytes(64), 31 * 64)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, write_no_number, forget_a_piece, swap_pieces, swap_tokens, lose_the_checksum]
)
@pytest.mark.parametrize("is_put_first", [False, True])
def test_a_corrupt_entry_is_a_miss_and_is_replaced(
    damage: Callable[[Pieces], None], is_put_first: bool, server: LMCacheServer, store: LMCacheStore
) -> None:
    """`is_put_first`: nobody has read it since it was damaged."""
    chunk = Chunk(as_token_ids(range(LENGTH)), f"{damage.__name__} {is_put_first}")
    kv = torch.randn(2, 3, LENGTH, 32).bfloat16()
    assert store.put(chunk, kv)
    assert store.put(chunk_of(33), kv_of(33))
    with server.memory() as memory:
        damage(Pieces(memory, kv))
    if not is_put_first:
        with store.retrieval([chunk_of(33), chunk]) as retrieval:
            assert list(retrieval.held) == [True, True]
            sound, corrupt = retrieval.take([0, 1])
            assert corrupt is None
            assert sound is not None
            assert torch.equal(joined(sound), kv_of(33))
        assert (store.stats.hits, store.stats.misses, store.stats.errors) == (1, 1, 1)
        store._releases.submit(lambda: None).result()  # what was taken is given back, and what was corrupt dropped
        assert not is_held(store, chunk)
    assert store.put(chunk, kv)
    found = get(store, chunk)
    assert found is not None
    assert torch.equal(found, kv)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_kv_that_isnt_finite_is_not_kept(value: float, store: LMCacheStore) -> None:
    kv = kv_of(65)
    kv[1, 2, 64, 31] = value
    assert not store.put(chunk_of(65), kv)
    assert get(store, chunk_of(65)) is None
    assert store.stats.errors == 1


class Answer:
    def __init__(self, value: object) -> None:
        self.value = value

    def wait(self, timeout: float | None = None) -> bool:
        return not isinstance(self.value, TimeoutError)

    def result(self, timeout: float | None = None) -> object:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


def refuse(error: BaseException) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise error

    return call


FAILURES: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "raises at once": lambda _: refuse(KeyError("slots")),
    "raises after it was asked": lambda call: lambda *args: (call(*args).wait(5), Answer(RuntimeError("no")))[1],
    "has no answer": lambda call: lambda *args: (call(*args).wait(5), Answer(TimeoutError("late")))[1],
    "says nothing": lambda call: lambda *args: (call(*args).wait(5), Answer(None))[1],
}
CALLS = [
    "lookup",
    "query_prefetch_status",
    "prepare_retrieve",
    "commit_retrieve",
    "free_lookup_locks",
    "end_session",
    "prepare_store",
    "commit_store",
    "ping",
]
KEEPS_LOCKS = {("free_lookup_locks", "raises at once"), ("prepare_retrieve", "raises at once")}
"""What was never sent: nothing frees these locks before LMCache does, after five minutes."""


@pytest.fixture
def gives_up_soon() -> Iterator[None]:
    """A store whose server answers, but not all that it was asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmcache_context, "_GIVE_UP_S", 0.5)
        yield


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_is_a_miss_and_leaves_nothing_behind(
    name: str, failure: str, server: LMCacheServer, monkeypatch: pytest.MonkeyPatch, gives_up_soon: None
) -> None:
    salt = f"{name} {failure}"
    known, unknown, new = (Chunk(as_token_ids([number] * LENGTH), salt) for number in (1, 2, 3))
    kv = kv_of(LENGTH)
    before = num_descriptors_and_threads()
    store = LMCacheStore(GEOMETRY, server.url, server.http_url, timeout_s=0.5, retry_s=0.05)
    wait_until(lambda: store.put(known, kv))
    client = context_of(store)._req_client
    monkeypatch.setattr(client, name, FAILURES[failure](getattr(client, name)))
    with store.retrieval([known, unknown]) as retrieval:
        taken = retrieval.take([0, 1])
        assert taken[1] is None
        assert taken[0] is None or torch.equal(joined(taken[0]), kv)
        assert store.stats.hits + store.stats.misses == 2
    is_there = store.put(new, kv)
    found = get(store, new)
    assert found is None or torch.equal(found, kv)
    assert found is not None or not is_there or store.stats.errors
    monkeypatch.undo()
    wait_until(lambda: store.put(new, kv))
    for chunk in (known, new):
        wait_until(partial(has, store, chunk, kv))
    if (name, failure) not in KEEPS_LOCKS:
        wait_until(lambda: num_locked(store, [known, new]) == 0)
    store.close()
    del retrieval, taken, client
    wait_until(lambda: is_no_more(num_descriptors_and_threads(), before))


REGISTRATION = "register_kv_cache_engine_driven_context"


@pytest.mark.parametrize("step", ["GET /config", REGISTRATION])
def test_a_connection_that_fails_half_way_leaves_nothing(
    step: str, server: LMCacheServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = LMCacheStore(GEOMETRY, server.url, server.http_url)
    client = type(context_of(working)._req_client)
    working.close()
    del working
    before = num_descriptors_and_threads()
    if step == REGISTRATION:
        assert callable(getattr(client, REGISTRATION))
        monkeypatch.setattr(client, REGISTRATION, lambda *_: Answer(RuntimeError("no")))
    else:
        monkeypatch.setattr(requests, "get", refuse(requests.ConnectionError("refused")))
    store = LMCacheStore(GEOMETRY, server.url, server.http_url, retry_s=0.01)
    chunk, kv = Chunk(as_token_ids([4] * LENGTH), step), kv_of(LENGTH)
    for number in range(1, 51):
        assert get(store, chunk) is None
        assert store.stats.errors == number
        time.sleep(0.02)
    wait_until(lambda: is_no_more(num_descriptors_and_threads(), (before[0] + 8, before[1] + 2)))
    monkeypatch.undo()
    wait_until(lambda: store.put(chunk, kv))
    store.close()
    wait_until(lambda: is_no_more(num_descriptors_and_threads(), before))


def test_a_corrupt_entry_that_cant_be_deleted_is_a_miss_until_it_is_stored_anew(
    server: LMCacheServer, store: LMCacheStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, kv = Chunk(as_token_ids(range(LENGTH)), "undeletable"), torch.randn(2, 3, LENGTH, 32).bfloat16()
    wait_until(lambda: store.put(chunk, kv))
    with server.memory() as memory:
        flip_a_bit(Pieces(memory, kv))
    monkeypatch.setattr(requests, "delete", refuse(requests.ConnectionError("refused")))
    for _ in range(3):
        assert get(store, chunk) is None
        assert not store.put(chunk, kv)
    monkeypatch.undo()
    wait_until(lambda: store.put(chunk, kv))
    found = get(store, chunk)
    assert found is not None
    assert torch.equal(found, kv)
    wait_until(lambda: num_locked(store, [chunk]) == 0)


def test_clearing_a_server_that_refuses_is_an_error(store: LMCacheStore, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = Chunk(as_token_ids([6] * LENGTH), "uncleared")
    wait_until(lambda: store.put(chunk, kv_of(LENGTH)))
    num_errors = store.stats.errors
    monkeypatch.setattr(requests, "post", refuse(requests.ConnectionError("refused")))
    store.clear()
    assert store.stats.errors == num_errors + 1
    monkeypatch.undo()
    wait_until(lambda: get(store, chunk) is not None)


def test_locks_of_a_chunk_that_two_read_at_once_are_given_back(store: LMCacheStore) -> None:
    """The server keeps one of two loads by the same name, and takes the other one's locks never back."""
    chunk = Chunk(as_token_ids([7] * LENGTH))
    assert store.put(chunk, kv_of(LENGTH))
    with store.retrieval([chunk]) as first, store.retrieval([chunk]) as second, store.retrieval([chunk]) as third:
        assert all(pieces for of in (first, second, third) for pieces in of.take([0]))
        assert num_locked(store, [chunk]) == 3
    wait_until(lambda: num_locked(store, [chunk]) == 0)
    assert store.stats.errors == 0


def test_a_load_that_is_short_is_a_miss(store: LMCacheStore, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = Chunk(as_token_ids([5] * LENGTH))
    assert store.put(chunk, kv_of(LENGTH))
    engine_driven = context_of(store)._engine_driven
    load = engine_driven.prepare_retrieve
    monkeypatch.setattr(engine_driven, "prepare_retrieve", lambda *args: load(*args)[:-1])
    assert get(store, chunk) is None
    assert store.stats.errors == 1
    monkeypatch.undo()
    wait_until(lambda: get(store, chunk) is not None)


def context_of(store: LMCacheStore) -> Any:
    wait_until(lambda: store._context is not None)
    return store._context


def has(store: LMCacheStore, chunk: Chunk, kv: torch.Tensor) -> bool:
    """What is found is right."""
    found = get(store, chunk)
    assert found is None or torch.equal(found, kv)
    return found is not None


def is_held(store: LMCacheStore, chunk: Chunk) -> bool:
    with store.retrieval([chunk]) as retrieval:
        return bool(retrieval.held[0])


def num_locked(store: LMCacheStore, chunks: list[Chunk]) -> int:
    """The server refuses to delete locked pieces; those that aren't are put there again by others who need them."""
    context: LMCacheContext = context_of(store)
    hasher = TokenHasher(context.chunk_size)
    keys = []
    for chunk in chunks:
        key = context._key(Lookup(chunk, "", context._padded(chunk)))
        found, _ = resolve_object_keys(hasher, key.model_name, 1, list(key.token_ids), key.cache_salt)
        keys += [asdict(one.to_encoded_object_key()) for one in found]
    answer = requests.delete(f"{store.http_url}/cache/objects", json={"keys": keys, "tier": "l1"}, timeout=5)
    answer.raise_for_status()
    return int(answer.json()["skipped"])


def num_descriptors_and_threads() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def is_no_more(now: tuple[int, int], before: tuple[int, int]) -> bool:
    return now[0] <= before[0] + 2 and now[1] <= before[1] + 1
