"""Chunk KV in an LMCache server: its tiers and its isolation by salt become ours.

One thread connects, pings and reconnects. A server that dies or hangs costs one time-out; from then on every request is
a miss at once, counted as an error, until that thread has a connection again. What the server locked for calls that it
hadn't answered is released over the old connection, once it answers. The pings also keep the server from dropping a
store that has been idle for an hour. A restarted server finds nothing at all, though its second tier may have
everything: that is how a restart is noticed. A corrupt chunk is a miss, counted as an error.
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

from kvarena.core.devices import begin_thread
from kvarena.core.plan import Chunk
from kvarena.core.store import Pieces, StoreStats, is_finite
from kvarena.stores.lmcache_context import (
    PING_TIMEOUT_S,
    AtServer,
    ChunkLost,
    KVGeometry,
    LMCacheContext,
    ServerRestarted,
)

__all__ = ["KVGeometry", "LMCacheStore"]

_PING_S = 5.0
"""LMCache drops a registration that has pinged before and is silent for 120 s."""
_LOCK_TTL_S = 300.0
"""The server's own limit (`read_ttl_seconds`): a lock that is older is gone."""

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class LMCacheStore:
    """A `ChunkStore` over one LMCache server. Thread-safe: calls are made one after the other.

    `timeout_s` bounds one call to the server. After a failure nothing is asked until the store's own thread has
    connected again, which it tries at once and then every `retry_s`. `device` is the model's.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        url: str,
        http_url: str,
        *,
        device: torch.device | None = None,
        timeout_s: float = 1.0,
        retry_s: float = 5.0,
    ) -> None:
        self.geometry = geometry
        self.url = url
        self.http_url = http_url
        self.device = device
        self.timeout_s = timeout_s
        self.retry_s = retry_s
        self.stats = StoreStats()
        self._context: LMCacheContext | None = None
        self._retired: list[LMCacheContext] = []
        """Connections that failed, as long as something of theirs is in use here, or locked there."""
        self._lock = threading.RLock()
        self._releases = ThreadPoolExecutor(1, "kvarena-release", begin_thread, (device,))
        self._is_closed = False
        self._wake = threading.Event()
        self._tried = threading.Event()
        """Set once the first attempt to connect has ended, either way."""
        self._keeper = threading.Thread(target=self._keep_connected, name="kvarena-lmcache-keeper", daemon=True)
        self._keeper.start()

    @contextmanager
    def retrieval(self, chunks: Sequence[Chunk]) -> Iterator[_Retrieval]:
        retrieval = _Retrieval(self, chunks)
        self._ask("look up", retrieval.look_up, default=None)
        self.stats.misses += retrieval.held.count(False)
        try:
            yield retrieval
        finally:
            if context := retrieval.end():
                self._releases.submit(self._release, context, retrieval)

    def put(self, chunk: Chunk, kv: torch.Tensor) -> bool:
        """True only if the server then holds the chunk intact. KV that isn't finite isn't kept."""
        if not is_finite(kv):
            self.stats.errors += 1
            return False
        done = self._ask("put", lambda context: context.store_padded(chunk, kv), default=False, waits=True)
        self.stats.puts += done
        return done

    def add_scores(self, chunk: Chunk, scores: torch.Tensor) -> bool:
        """Waits until what was taken before has been released: the server drops nothing that is being read. A chunk
        that gets lost counts as an error.
        """

        def add(context: LMCacheContext) -> bool:
            try:
                return context.add_scores(chunk, scores)
            except ChunkLost as error:
                logger.warning("LMCache at %s: %s", self.url, error)
                self.stats.errors += 1
                return False

        self._releases.submit(lambda: None).result()
        return self._ask("score", add, default=False, waits=True)

    def clear(self) -> None:
        """Drop the server's whole first tier: LMCache has no narrower call."""
        self._ask("clear", lambda context: context.clear_server(), default=None, waits=True)

    def close(self) -> None:
        self._is_closed = True
        self._wake.set()
        self._keeper.join(timeout=self.timeout_s + PING_TIMEOUT_S)
        with self._lock:
            self._disconnect()
        self._releases.shutdown()

    def take(self, retrieval: _Retrieval, indices: Sequence[int]) -> list[Pieces | None]:
        """For `_Retrieval.take`; counts hits and misses."""
        nothing: list[Pieces | None] = [None] * len(indices)
        if not any(retrieval.held[index] for index in indices):
            return nothing
        num_corrupt = len(retrieval.at_server.corrupt)
        found = self._ask("get", lambda context: retrieval.take_from(context, indices), default=nothing)
        for lookup, numbers in retrieval.at_server.corrupt[num_corrupt:]:
            logger.warning(
                "LMCache at %s has a corrupt chunk of %d tokens (%d of its pieces); it is computed anew",
                self.url,
                len(lookup.chunk),
                len(numbers),
            )
            self.stats.errors += 1
        hits = sum(kv is not None for kv in found)
        self.stats.hits += hits
        self.stats.misses += sum(retrieval.held[index] for index in indices) - hits
        return found

    def _release(self, context: LMCacheContext, retrieval: _Retrieval) -> None:
        """In the background. What a failed connection has locked is released once its server answers."""
        with self._lock:
            if context.retired_at is None:
                self._ask("release", lambda _: context.release(retrieval.at_server), default=None)
            else:
                context.stranded.append(retrieval.at_server)
            context.num_retrievals -= 1
        self._settle_retired()

    def _settle_retired(self) -> None:
        """In the thread that releases. A connection is kept while somebody reads the server's memory through it, and
        while its server lives and may hold locks for it.
        """
        for context in list(self._retired):
            try:
                self._release_stranded(context)
            except Exception as error:
                logger.info("LMCache at %s keeps locks for a while (%s)", self.url, error)
            if not context.stranded and not context.num_retrievals:
                context.retire()
                self._retired.remove(context)

    def _release_stranded(self, context: LMCacheContext) -> None:
        """A server that doesn't answer is asked once more, at the end."""
        assert context.retired_at is not None
        is_last = self._is_closed or time.monotonic() > context.retired_at + _LOCK_TTL_S
        try:
            if self._context is not None or is_last:
                context.release_stranded(self._context)
        finally:
            if is_last:
                context.stranded.clear()

    def _ask(
        self, what: str, call: Callable[[LMCacheContext], Result], *, default: Result, waits: bool = False
    ) -> Result:
        """The call's result, or `default`: at once where there is no connection, but for the first attempt to connect.
        `waits`: for other calls to end, however long they take; with a server that hangs, several time-outs.
        """
        self._tried.wait(self.timeout_s)
        if not self._lock.acquire(timeout=-1 if waits else self.timeout_s):
            self.stats.errors += 1
            return default
        try:
            if self._context is None:
                self.stats.errors += 1
                return default
            return self._call(call)
        except Exception as error:
            logger.warning("LMCache at %s failed to %s (%s); trying to connect again", self.url, what, error)
            self.stats.errors += 1
            self._disconnect()
            return default
        finally:
            self._lock.release()

    def _call(self, call: Callable[[LMCacheContext], Result]) -> Result:
        """Again with a new context where the server was restarted."""
        assert self._context is not None
        try:
            return call(self._context)
        except ServerRestarted:
            self._disconnect()
            self._context = LMCacheContext(self.geometry, self.url, self.http_url, self.timeout_s, self.device)
            return call(self._context)

    def _disconnect(self) -> None:
        """To be called with the lock. Whatever may wait for the server is left to the thread that releases."""
        if self._context:
            self._context.retired_at = time.monotonic()
            self._retired.append(self._context)
            self._releases.submit(self._settle_retired)
        self._context = None
        self._wake.set()

    def _keep_connected(self) -> None:
        """The store's own thread: connects where there is no connection, and pings where there is one."""
        begin_thread(self.device)
        while not self._is_closed:
            self._wake.clear()
            context = self._context
            if self._retired:
                self._releases.submit(self._settle_retired)
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
            context = LMCacheContext(self.geometry, self.url, self.http_url, self.timeout_s, self.device)
        except Exception as error:
            logger.log(self._log_level, "LMCache at %s can't be reached (%s)", self.url, error)
            return False
        else:
            with self._lock:
                if self._context is None and not self._is_closed:
                    self._context = context
                else:
                    context.retire()
            return True
        finally:
            self._tried.set()

    @property
    def _log_level(self) -> int:
        """An outage is a warning once; that it goes on is a detail."""
        return logging.DEBUG if self._tried.is_set() else logging.WARNING

    def _ping(self, context: LMCacheContext) -> None:
        """Without the lock, so that requests needn't wait."""
        try:
            context.ping()
        except Exception as error:
            with self._lock:
                if self._context is context:
                    logger.warning("LMCache at %s doesn't answer (%s); trying to connect again", self.url, error)
                    self._disconnect()


class _Retrieval:
    """Chunks looked up in the server, which keeps them until the end. Without a context nothing is held.

    The pieces that are taken are in the server's shared memory, so the context outlives them.
    """

    def __init__(self, store: LMCacheStore, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.held = [False] * len(chunks)
        self.failed = True
        self.at_server = AtServer()
        self._store = store
        self._context: LMCacheContext | None = None

    def look_up(self, context: LMCacheContext) -> None:
        """Called by the store. From now on the context has something to release, even if this raises."""
        self._context = context
        context.num_retrievals += 1
        try:
            self.held = [lookup.is_held for lookup in context.look_up(self.chunks, self.at_server)]
        except ServerRestarted:  # nothing was found, and the store calls again with a new context
            self.end()
            self.at_server = AtServer()
            context.num_retrievals -= 1
            raise
        self.failed = False

    def take(self, indices: Sequence[int]) -> list[Pieces | None]:
        return self._store.take(self, indices)

    def scores(self, index: int) -> torch.Tensor | None:
        scores = self.at_server.scores.get(self.chunks[index])
        return scores.mean if scores else None

    def take_from(self, context: LMCacheContext, indices: Sequence[int]) -> list[Pieces | None]:
        """Called by the store. Only the context that looked them up has them."""
        if context is not self._context:
            return [None] * len(indices)
        return context.take([self.at_server.lookups[index] for index in indices], self.at_server)

    def end(self) -> LMCacheContext | None:
        """Nothing can be taken any more. Returns the context that has something to release, if there is one."""
        context, self._context = self._context, None
        return context
