"""Chunk KV in an LMCache server, through its public SDK: its tiers and its isolation by salt become ours.

The model's geometry is given by hand, for the SDK reads it off a registered GPU engine. LMCache keeps whole pieces of
`--chunk-size` tokens and drops the rest, so a chunk is padded with tokens that no vocabulary has.

One thread connects, pings and reconnects. A server that dies or hangs costs one time-out; from then on every request is
a miss at once, counted as an error, until that thread has a connection again. The pings also keep the server from
dropping a store that nobody used for an hour. A server that was restarted is noticed when it finds nothing at all: its
second tier may have everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import requests
import torch
import zmq
from lmcache.sdk.context import LMCacheSDKContext, LMCacheSDKError
from lmcache.sdk.wrapper.contiguous import ContiguousTransferWrapper
from lmcache.v1.gpu_connector.utils import LayoutHints
from lmcache.v1.multiprocess.transfer_context.worker_transfer import create_transfer_context

from kvarena.core.plan import Chunk
from kvarena.core.store import Pieces, StoreStats

_FILLER_TOKEN = 0x7FFFFFFF
_BLOCK_TOKENS = 32
_POLL_S = 0.001
_RESTART_CHECK_S = 1.0
_NUM_THREADS = 4
_PING_S = 5.0
"""LMCache drops a registration that has pinged before and is silent for 120 s."""
_PING_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class KVGeometry:
    """Shape and dtype of a model's KV, and a name that no model with other KV has."""

    model_id: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype


class ServerRestarted(LMCacheSDKError):
    """The server isn't the one that this context registered with."""


@dataclass(frozen=True)
class Lookup:
    """A chunk's look-up: its session at the server, its token ids, filled up, and how many of these the server has.

    The server locks what it found against eviction, until it is taken and given back, or freed.
    """

    chunk: Chunk
    session: str
    padded: list[int]
    num_found: int

    @property
    def is_held(self) -> bool:
        return self.num_found == len(self.padded)


class LMCacheContext(LMCacheSDKContext):
    """The SDK's context with its geometry given by hand; the SDK itself reads it off a registered GPU engine."""

    def __init__(self, geometry: KVGeometry, url: str, http_url: str, timeout_s: float) -> None:
        self.num_retrievals = 0
        self.is_retired = False
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="kvarena-lmcache")
        self._engine_driven: Any = None
        try:
            super().__init__(url, http_url, geometry.model_id, timeout=timeout_s)
            if self.chunk_size % _BLOCK_TOKENS:
                raise LMCacheSDKError(f"--chunk-size must be a multiple of {_BLOCK_TOKENS}, not {self.chunk_size}")
            self._server = self._server_instance()
            self._checked_at = time.monotonic()
            self._world_size = 1
            self._num_kv_readers = 1
            self._register(geometry)
        except BaseException:
            self.close()  # the SDK opens sockets and threads before it knows whether anybody is there
            raise

    def close(self) -> None:
        """Gives back sockets, threads and the server's memory, as far as no tensor is in use there."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(BufferError):
            if self._engine_driven is not None:
                self._engine_driven.close()
        if (client := getattr(self, "_req_client", None)) is not None:
            client.close()
        if (sockets := getattr(self, "_sockets", None)) is not None:
            sockets.destroy(linger=0)

    def close_when_unused(self) -> None:
        """Unmaps the server's memory, but not under somebody who reads it."""
        self.is_retired = True
        if not self.num_retrievals:
            self.close()

    def ping(self) -> None:
        """Tells the server that this context is alive. Raises `TimeoutError` when no answer comes, and
        `ServerRestarted` when another server answers.
        """
        self._req_client.ping(self.instance_id).result(timeout=_PING_TIMEOUT_S)
        if self._server_instance() != self._server:
            raise ServerRestarted("it was started anew")

    def unregister(self) -> None:
        self._req_client.unregister_kv_cache_engine_driven_context(self.instance_id).result(timeout=self.mq_timeout)

    @property
    def _zmq_context(self) -> zmq.Context[Any]:
        return self._sockets

    @_zmq_context.setter
    def _zmq_context(self, context: zmq.Context[Any]) -> None:
        """Sockets of a dead server must not keep `close` waiting for messages that nobody will take."""
        context.linger = 0
        self._sockets = context

    def _register(self, geometry: KVGeometry) -> None:
        shape = (1, 2, geometry.num_kv_heads, _BLOCK_TOKENS, geometry.head_size)
        layers = {f"layer.{i}": torch.zeros(shape, dtype=geometry.dtype) for i in range(geometry.num_layers)}
        transfer = create_transfer_context(layers, instance_id=self.instance_id, req_client=self._req_client)
        hints = LayoutHints(
            kv_layout="HND",
            num_kv_heads=geometry.num_kv_heads,
            tokens_per_block=_BLOCK_TOKENS,
            head_dim=geometry.head_size,
        )
        blocks = self.chunk_size // _BLOCK_TOKENS
        transfer.register(layers, self._model_name, 1, blocks, self.mq_timeout, layout_hints=hints)
        self._engine_driven = transfer.engine_driven_context
        self._transfer_ctx = ContiguousTransferWrapper(self._engine_driven, self.chunk_size)

    def look_up(self, chunks: Sequence[Chunk]) -> list[Lookup]:
        """Side by side: a round trip each, one after the other, would cost more than the data."""
        sessions = [f"kvarena-{uuid.uuid4().hex}" for _ in chunks]
        padded = [self._padded(chunk) for chunk in chunks]
        keys = [self._key(*call) for call in zip(chunks, padded, sessions, strict=True)]
        deadline = time.monotonic() + self.mq_timeout
        for answer in [self._req_client.lookup(key.no_worker_id_version(), 1) for key in keys]:
            answer.result(timeout=_left(deadline))
        asked = [self._req_client.query_prefetch_status(session) for session in sessions]
        found = [self._num_found(session, answer, deadline) for session, answer in zip(sessions, asked, strict=True)]
        lookups = [Lookup(*lookup) for lookup in zip(chunks, sessions, padded, found, strict=True)]
        if not any(lookup.is_held for lookup in lookups):
            self._notice_restart()
        return lookups

    def _notice_restart(self) -> None:
        """A server that was started anew doesn't know this context, and finds nothing for it."""
        if time.monotonic() < self._checked_at + _RESTART_CHECK_S:
            return
        self._checked_at = time.monotonic()
        if self._server_instance() != self._server:
            raise ServerRestarted("it was started anew")

    def _server_instance(self) -> str:
        """A name that the server has from one start to the next."""
        answer = requests.get(f"{self._http_url}/config", timeout=self.mq_timeout)
        answer.raise_for_status()
        return str(answer.json()["mp"]["instance_id"])

    def take(self, lookups: Sequence[Lookup], taken: list[Lookup]) -> list[Pieces | None]:
        """`taken` gets the look-ups whose locks are given back by giving back the pieces, also when this raises."""
        return list(self._threads.map(lambda lookup: self._take(lookup, taken), lookups))

    def _take(self, lookup: Lookup, taken: list[Lookup]) -> Pieces | None:
        if not lookup.is_held:
            return None
        slots = self._engine_driven.prepare_retrieve(self._read_key(lookup), self.instance_id)
        if not slots:
            raise LMCacheSDKError("a chunk that it held is gone, or no answer came")
        taken.append(lookup)
        rest = len(lookup.padded) - len(lookup.chunk)
        return [*slots[:-1], slots[-1][:, :, : slots[-1].shape[2] - rest]]

    def release(self, lookups: Sequence[Lookup], taken: Sequence[Lookup]) -> None:
        """The server may drop what was taken, and what was only looked up: the end of a session alone frees no lock."""
        given_back = {lookup.session for lookup in taken}
        locked = [lookup for lookup in lookups if lookup.num_found and lookup.session not in given_back]
        deadline = time.monotonic() + self.mq_timeout
        freed = [self._req_client.free_lookup_locks(self._lookup_key(lookup), 1) for lookup in locked]
        keys = [self._read_key(lookup) for lookup in taken]
        is_back = list(self._threads.map(lambda key: self._engine_driven.commit_retrieve(key, self.instance_id), keys))
        for answer in freed:
            answer.result(timeout=_left(deadline))
        for ended in [self._req_client.end_session(lookup.session) for lookup in lookups]:
            ended.result(timeout=_left(deadline))
        if not all(is_back):
            raise LMCacheSDKError("it didn't take back what was taken")

    def store_padded(self, chunk: Chunk, kv: torch.Tensor) -> bool:
        """Whether the server holds the chunk afterwards. What `store` itself says is not that: no for a chunk that was
        there already, and yes for one that found no room.
        """
        ids = self._padded(chunk)
        full = torch.nn.functional.pad(kv, (0, 0, 0, len(ids) - len(chunk)))
        self.store(full, ids, cache_salt=_server_salt(chunk.salt))
        return self.holds(chunk)

    def holds(self, chunk: Chunk) -> bool:
        (lookup,) = self.look_up([chunk])
        self.release([lookup], [])
        return lookup.is_held

    def clear_server(self) -> None:
        requests.post(f"{self._http_url}/cache/clear", timeout=self.mq_timeout).raise_for_status()

    def _num_found(self, session: str, answer: Any, deadline: float) -> int:
        """Tokens that a look-up found; it is asked again for as long as the server has not finished it."""
        while (pieces := answer.result(timeout=_left(deadline))) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"lookup took longer than {self.mq_timeout} s")
            time.sleep(_POLL_S)
            answer = self._req_client.query_prefetch_status(session)
        return int(pieces * self.chunk_size)

    def _padded(self, chunk: Chunk) -> list[int]:
        ids: list[int] = chunk.token_ids.tolist()
        return ids + [_FILLER_TOKEN] * (-len(ids) % self.chunk_size)

    def _lookup_key(self, lookup: Lookup) -> Any:
        return self._key(lookup.chunk, lookup.padded, lookup.session).no_worker_id_version()

    def _read_key(self, lookup: Lookup) -> Any:
        return self._key(lookup.chunk, lookup.padded, lookup.session, worker_id=0)

    def _key(self, chunk: Chunk, ids: list[int], name: str, worker_id: int | None = None) -> Any:
        return self._create_key(ids, 0, len(ids), name, cache_salt=_server_salt(chunk.salt), worker_id=worker_id)


def _left(deadline: float) -> float:
    """The seconds until then, so that many answers together take no longer than one may."""
    return max(0.0, deadline - time.monotonic())


def _server_salt(salt: str) -> str:
    """LMCache forbids some characters in a salt; a digest has none of them."""
    return hashlib.blake2b(salt.encode(), digest_size=16).hexdigest() if salt else ""


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_FAILURES = (LMCacheSDKError, TimeoutError, RuntimeError, ValueError, OSError)
"""What the SDK raises when the server is gone, hangs, or says no; a time-out of `requests` is an `OSError`."""


class LMCacheStore:
    """A `ChunkStore` over one LMCache server. Thread-safe: calls are made one after the other.

    `timeout_s` bounds one call to the server. After a failed one nothing is asked until the store's own thread has
    connected again, which it tries every `retry_s`. It begins at once, so that the first request needn't wait.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        url: str,
        http_url: str,
        *,
        timeout_s: float = 1.0,
        retry_s: float = 5.0,
    ) -> None:
        self.geometry = geometry
        self.url = url
        self.http_url = http_url
        self.timeout_s = timeout_s
        self.retry_s = retry_s
        self.stats = StoreStats()
        self._context: LMCacheContext | None = None
        self._lock = threading.RLock()
        self._releases = ThreadPoolExecutor(1, thread_name_prefix="kvarena-release")
        self._is_closed = False
        self._wake = threading.Event()
        self._tried = threading.Event()
        """Set once the attempt to connect that was asked for last has ended, either way."""
        self._keeper = threading.Thread(target=self._keep_connected, name="kvarena-lmcache-keeper", daemon=True)
        self._keeper.start()

    @contextmanager
    def retrieval(self, chunks: Sequence[Chunk]) -> Iterator[_Retrieval]:
        retrieval = self._ask("look up", lambda context: _Retrieval(self, context, chunks), default=None)
        retrieval = retrieval or _Retrieval(self, None, chunks)
        self.stats.misses += retrieval.held.count(False)
        try:
            yield retrieval
        finally:
            if context := retrieval.end():
                self._releases.submit(self._release, context, retrieval)

    def put(self, chunk: Chunk, kv: torch.Tensor) -> bool:
        """True only if the server holds the chunk afterwards."""
        done = self._ask("put", lambda context: context.store_padded(chunk, kv), default=False)
        self.stats.puts += done
        return done

    def clear(self) -> None:
        """Drop the server's whole first tier: LMCache has no narrower call."""
        self._ask("clear", lambda context: context.clear_server(), default=None)

    def close(self) -> None:
        self._releases.shutdown()
        self._is_closed = True
        self._wake.set()
        self._keeper.join(timeout=self.timeout_s + _PING_TIMEOUT_S)
        with self._lock:
            if self._context and not self._context.num_retrievals:
                with contextlib.suppress(*_FAILURES):
                    self._context.unregister()
            self._disconnect()

    def take(self, retrieval: _Retrieval, indices: Sequence[int]) -> list[Pieces | None]:
        """What `_Retrieval.take` returns, counted."""
        nothing: list[Pieces | None] = [None] * len(indices)
        if not any(retrieval.held[index] for index in indices):
            return nothing
        taken = self._ask("get", lambda context: retrieval.take_from(context, indices), default=nothing)
        found = [self._checked(retrieval.chunks[i], kv) for i, kv in zip(indices, taken, strict=True)]
        hits = sum(kv is not None for kv in found)
        self.stats.hits += hits
        self.stats.misses += sum(retrieval.held[index] for index in indices) - hits
        return found

    def _release(self, context: LMCacheContext, retrieval: _Retrieval) -> None:
        """Nobody waits for it. A context that failed is asked too, without the lock: its server may well be alive."""
        try:
            if context.is_retired:
                context.release(retrieval.lookups, retrieval.taken)
            else:
                self._ask("release", lambda _: context.release(retrieval.lookups, retrieval.taken), default=None)
        except _FAILURES as error:
            logger.info("LMCache at %s keeps locks for a while (%s)", self.url, error)
        finally:
            with self._lock:
                context.num_retrievals -= 1
                if context.is_retired:
                    context.close_when_unused()

    def _ask(self, what: str, call: Callable[[LMCacheContext], Result], *, default: Result) -> Result:
        """`default`, at once, where there is no connection; but the first attempt to connect is waited for."""
        self._tried.wait(self.timeout_s)
        with self._lock:
            if self._context is None:
                self.stats.errors += 1
                return default
            try:
                return self._call(call)
            except _FAILURES as error:
                logger.warning("LMCache at %s failed to %s (%s); trying to connect again", self.url, what, error)
                self.stats.errors += 1
                self._disconnect()
                return default

    def _call(self, call: Callable[[LMCacheContext], Result]) -> Result:
        """Once more, with a new context, where the server was started anew."""
        assert self._context is not None
        try:
            return call(self._context)
        except ServerRestarted:
            self._disconnect()
            self._context = LMCacheContext(self.geometry, self.url, self.http_url, self.timeout_s)
            return call(self._context)

    def _disconnect(self) -> None:
        """With the lock."""
        if self._context:
            self._context.close_when_unused()
        self._context = None
        self._wake.set()

    def _keep_connected(self) -> None:
        """The store's own thread: connects where there is no connection, and pings where there is one."""
        while not self._is_closed:
            self._wake.clear()
            context = self._context
            if context is not None:
                self._ping(context)
            elif not self._connect():
                self._wake.clear()
                self._sleep(self.retry_s)
                continue
            self._sleep(_PING_S)

    def _sleep(self, seconds: float) -> None:
        if not self._is_closed:
            self._wake.wait(seconds)

    def _connect(self) -> bool:
        try:
            context = LMCacheContext(self.geometry, self.url, self.http_url, self.timeout_s)
        except _FAILURES as error:
            logger.log(self._log_level, "LMCache at %s can't be reached (%s)", self.url, error)
            return False
        else:
            with self._lock:
                if self._context is None and not self._is_closed:
                    self._context = context
                else:
                    context.close()
            return True
        finally:
            self._tried.set()

    @property
    def _log_level(self) -> int:
        """An outage is told of once; that it goes on is a detail."""
        return logging.DEBUG if self._tried.is_set() else logging.WARNING

    def _ping(self, context: LMCacheContext) -> None:
        """Without the lock: requests needn't wait for it."""
        try:
            context.ping()
        except _FAILURES as error:
            with self._lock:
                if self._context is context:
                    logger.warning("LMCache at %s doesn't answer (%s); trying to connect again", self.url, error)
                    self._disconnect()

    def _checked(self, chunk: Chunk, pieces: Pieces | None) -> Pieces | None:
        if pieces is None:
            return None
        geometry = self.geometry
        shapes = {(kv.dtype, *kv.shape[:2], *kv.shape[3:]) for kv in pieces}
        expected = (geometry.dtype, 2, geometry.num_layers, geometry.num_kv_heads * geometry.head_size)
        if shapes != {expected} or sum(kv.shape[2] for kv in pieces) != len(chunk):
            logger.warning("LMCache returned %s for a chunk of %d tokens, not %s", shapes, len(chunk), expected)
            self.stats.errors += 1
            return None
        return pieces


class _Retrieval:
    """Chunks looked up in the server, which holds on to them until the end. Without a context nothing is held.

    The pieces that are taken lie in the server's shared memory, so the context outlives them.
    """

    def __init__(self, store: LMCacheStore, context: LMCacheContext | None, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self._store = store
        self._context = context
        self.lookups = context.look_up(chunks) if context else []
        self.taken: list[Lookup] = []
        self.held = [lookup.is_held for lookup in self.lookups] or [False] * len(chunks)
        if context:
            context.num_retrievals += 1

    def take(self, indices: Sequence[int]) -> list[Pieces | None]:
        return self._store.take(self, indices)

    def take_from(self, context: LMCacheContext, indices: Sequence[int]) -> list[Pieces | None]:
        """Called by the store, one at a time. A context that isn't the one that looked up has none of them."""
        if context is not self._context:
            return [None] * len(indices)
        lookups = [self.lookups[index] for index in indices]
        return context.take(lookups, self.taken)

    def end(self) -> LMCacheContext | None:
        """Nothing can be taken any more. Returns the context that has something to be released, if there is one."""
        context, self._context = self._context, None
        return context
