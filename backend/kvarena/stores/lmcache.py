"""Chunk KV in an LMCache server, through its public SDK: its tiers and its isolation by salt become ours.

The model's geometry is given by hand, for the SDK reads it off a registered GPU engine. LMCache keeps whole pieces of
`--chunk-size` tokens and drops the rest, so a chunk is padded with tokens that no vocabulary has. A server that is
down costs one short time-out; then it isn't asked again for a while, and every request in between is a miss, counted
as an error. A server that was restarted is noticed when it finds nothing at all: its second tier may have everything.
"""

from __future__ import annotations

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
    """A chunk's look-up: its session at the server, and its token ids, filled up."""

    chunk: Chunk
    session: str
    padded: list[int]
    is_held: bool


class LMCacheContext(LMCacheSDKContext):
    """The SDK's context with its geometry given by hand; the SDK itself reads it off a registered GPU engine."""

    def __init__(self, geometry: KVGeometry, url: str, http_url: str, timeout_s: float) -> None:
        super().__init__(url, http_url, geometry.model_id, timeout=timeout_s)
        if self.chunk_size % _BLOCK_TOKENS:
            raise LMCacheSDKError(f"--chunk-size must be a multiple of {_BLOCK_TOKENS}, not {self.chunk_size}")
        self.num_retrievals = 0
        self.is_retired = False
        self._server = self._server_instance()
        self._checked_at = time.monotonic()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="kvarena-lmcache")
        self._world_size = 1
        self._num_kv_readers = 1
        self._register(geometry)

    def close_when_unused(self) -> None:
        """Unmaps the server's memory, but not under somebody who reads it."""
        self.is_retired = True
        if not self.num_retrievals:
            self._threads.shutdown(wait=False)
            self.close()

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
        for answer in [self._req_client.lookup(key.no_worker_id_version(), 1) for key in keys]:
            answer.result(timeout=self.mq_timeout)
        asked = [self._req_client.query_prefetch_status(session) for session in sessions]
        held = [self._num_found(*call) == len(ids) for *call, ids in zip(sessions, asked, padded, strict=True)]
        if not any(held):
            self._notice_restart()
        return [Lookup(*lookup) for lookup in zip(chunks, sessions, padded, held, strict=True)]

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

    def take(self, lookups: Sequence[Lookup]) -> list[Pieces | None]:
        return list(self._threads.map(self._take, lookups))

    def _take(self, lookup: Lookup) -> Pieces | None:
        if not lookup.is_held:
            return None
        slots = self._engine_driven.prepare_retrieve(self._read_key(lookup), self.instance_id)
        if not slots:
            raise LMCacheSDKError("a chunk that it held is gone, or no answer came")
        rest = len(lookup.padded) - len(lookup.chunk)
        return [*slots[:-1], slots[-1][:, :, : slots[-1].shape[2] - rest]]

    def release(self, lookups: Sequence[Lookup], taken: Sequence[Lookup]) -> None:
        """The server may drop what was taken, and what was only looked up."""
        keys = [self._read_key(lookup) for lookup in taken]
        if not all(self._threads.map(lambda key: self._engine_driven.commit_retrieve(key, self.instance_id), keys)):
            raise LMCacheSDKError("it didn't take back what was taken")
        self._end(*(lookup.session for lookup in lookups))

    def store_padded(self, chunk: Chunk, kv: torch.Tensor) -> bool:
        """Whether the server holds the chunk afterwards; `store` itself says no for one that it had already."""
        ids = self._padded(chunk)
        full = torch.nn.functional.pad(kv, (0, 0, 0, len(ids) - len(chunk)))
        return bool(self.store(full, ids, cache_salt=_server_salt(chunk.salt))) or self.holds(chunk)

    def holds(self, chunk: Chunk) -> bool:
        (lookup,) = self.look_up([chunk])
        self.release([lookup], [])
        return lookup.is_held

    def clear_server(self) -> None:
        requests.post(f"{self._http_url}/cache/clear", timeout=self.mq_timeout).raise_for_status()

    def _num_found(self, name: str, answer: Any) -> int:
        """Tokens that a look-up found; it is asked again for as long as the server has not finished it."""
        deadline = time.monotonic() + self.mq_timeout
        while (pieces := answer.result(timeout=self.mq_timeout)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"lookup took longer than {self.mq_timeout} s")
            time.sleep(_POLL_S)
            answer = self._req_client.query_prefetch_status(name)
        return int(pieces * self.chunk_size)

    def _end(self, *names: str) -> None:
        for ended in [self._req_client.end_session(name) for name in names]:
            ended.result(timeout=self.mq_timeout)

    def _padded(self, chunk: Chunk) -> list[int]:
        ids: list[int] = chunk.token_ids.tolist()
        return ids + [_FILLER_TOKEN] * (-len(ids) % self.chunk_size)

    def _read_key(self, lookup: Lookup) -> Any:
        return self._key(lookup.chunk, lookup.padded, lookup.session, worker_id=0)

    def _key(self, chunk: Chunk, ids: list[int], name: str, worker_id: int | None = None) -> Any:
        return self._create_key(ids, 0, len(ids), name, cache_salt=_server_salt(chunk.salt), worker_id=worker_id)


def _server_salt(salt: str) -> str:
    """LMCache forbids some characters in a salt; a digest has none of them."""
    return hashlib.blake2b(salt.encode(), digest_size=16).hexdigest() if salt else ""


logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class LMCacheStore:
    """A `ChunkStore` over one LMCache server. Thread-safe: calls are made one after the other.

    `timeout_s` bounds one call to the server; after a failed one it is left alone for `retry_s`.
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
        self._down_until = 0.0
        self._lock = threading.RLock()
        self._releases = ThreadPoolExecutor(1, thread_name_prefix="kvarena-release")

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
        done = self._ask("put", lambda context: context.store_padded(chunk, kv), default=False)
        self.stats.puts += done
        return done

    def clear(self) -> None:
        """Drop the server's whole first tier: LMCache has no narrower call."""
        self._ask("clear", lambda context: context.clear_server(), default=None)

    def close(self) -> None:
        self._releases.shutdown()
        self._disconnect()

    def _disconnect(self) -> None:
        with self._lock:
            if self._context:
                self._context.close_when_unused()
            self._context = None

    def take(self, retrieval: _Retrieval, indices: Sequence[int]) -> list[Pieces | None]:
        """What `_Retrieval.take` returns, counted."""
        nothing: list[Pieces | None] = [None] * len(indices)
        taken = self._ask("get", lambda context: retrieval.take_from(context, indices), default=nothing)
        found = [self._checked(retrieval.chunks[i], kv) for i, kv in zip(indices, taken, strict=True)]
        hits = sum(kv is not None for kv in found)
        self.stats.hits += hits
        self.stats.misses += sum(retrieval.held[index] for index in indices) - hits
        return found

    def _release(self, context: LMCacheContext, retrieval: _Retrieval) -> None:
        """Nobody waits for it. What is left of a context that failed isn't asked any more."""
        with self._lock:
            try:
                if not context.is_retired:
                    self._ask("release", lambda own: own.release(retrieval.lookups, retrieval.taken), default=None)
            finally:
                context.num_retrievals -= 1
                if context.is_retired:
                    context.close_when_unused()

    def _ask(self, what: str, call: Callable[[LMCacheContext], Result], *, default: Result) -> Result:
        with self._lock:
            if time.monotonic() < self._down_until:
                self.stats.errors += 1
                return default
            try:
                return self._call(call)
            except (LMCacheSDKError, TimeoutError, RuntimeError, ValueError, OSError) as error:
                self._leave_alone(what, error)
                return default

    def _call(self, call: Callable[[LMCacheContext], Result]) -> Result:
        """Once more, with a new context, where the server was started anew."""
        self._context = self._context or self._connect()
        try:
            return call(self._context)
        except ServerRestarted:
            self._disconnect()
            self._context = self._connect()
            return call(self._context)

    def _connect(self) -> LMCacheContext:
        return LMCacheContext(self.geometry, self.url, self.http_url, self.timeout_s)

    def _leave_alone(self, what: str, error: Exception) -> None:
        logger.warning(
            "LMCache at %s failed to %s (%s); not asked for %.0f s",
            self.url,
            what,
            error,
            self.retry_s,
        )
        self.stats.errors += 1
        self._disconnect()
        self._down_until = time.monotonic() + self.retry_s

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
        found = context.take(lookups)
        self.taken += [lookup for lookup, pieces in zip(lookups, found, strict=True) if pieces is not None]
        return found

    def end(self) -> LMCacheContext | None:
        """Nothing can be taken any more. Returns the context that has something to be released, if there is one."""
        context, self._context = self._context, None
        return context
