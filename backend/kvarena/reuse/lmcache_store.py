"""Chunk KV in an LMCache server: its tiers and its isolation by salt become ours.

A server that is down costs one short time-out; then it isn't asked again for a while, and every request in between is a
miss, counted as an error. One that was started anew is noticed when it finds nothing at all: its second tier may have
everything.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from lmcache.sdk.context import LMCacheSDKError

from kvarena.reuse.lmcache_context import KVGeometry, LMCacheContext, Lookup, ServerRestarted
from kvarena.reuse.plan import Chunk
from kvarena.reuse.store import Pieces, StoreStats

__all__ = ["KVGeometry", "LMCacheStore"]

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

    def contains(self, chunk: Chunk) -> bool:
        return self._ask("contains", lambda context: context.holds(chunk), default=False)

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

    def take(self, retrieval: _Retrieval, numbers: Sequence[int]) -> list[Pieces | None]:
        """What `_Retrieval.take` returns, counted."""
        nothing: list[Pieces | None] = [None] * len(numbers)
        taken = self._ask("get", lambda context: retrieval.take_from(context, numbers), default=nothing)
        found = [self._checked(retrieval.chunks[i], kv) for i, kv in zip(numbers, taken, strict=True)]
        hits = sum(kv is not None for kv in found)
        self.stats.hits += hits
        self.stats.misses += sum(retrieval.held[number] for number in numbers) - hits
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

    def take(self, numbers: Sequence[int]) -> list[Pieces | None]:
        return self._store.take(self, numbers)

    def take_from(self, context: LMCacheContext, numbers: Sequence[int]) -> list[Pieces | None]:
        """Called by the store, one at a time. A context that isn't the one that looked up has none of them."""
        if context is not self._context:
            return [None] * len(numbers)
        lookups = [self.lookups[number] for number in numbers]
        found = context.take(lookups)
        self.taken += [lookup for lookup, pieces in zip(lookups, found, strict=True) if pieces is not None]
        return found

    def end(self) -> LMCacheContext | None:
        """Nothing can be taken any more. Returns the context that has something to be released, if there is one."""
        context, self._context = self._context, None
        return context
