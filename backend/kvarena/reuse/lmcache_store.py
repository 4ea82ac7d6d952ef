"""Chunk KV in an LMCache server, through LMCache's public SDK: its tiers and its isolation by salt become ours.

LMCache keeps whole pieces of `--chunk-size` tokens and drops the rest, so a chunk is filled up with tokens that no
vocabulary has. A server that is down costs one short time-out; then it isn't asked again for a while, and every
request in between is a miss, counted as an error.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import requests
import torch
import zmq
from lmcache.sdk.context import LMCacheSDKContext, LMCacheSDKError
from lmcache.sdk.wrapper.contiguous import ContiguousTransferWrapper
from lmcache.v1.gpu_connector.utils import LayoutHints
from lmcache.v1.multiprocess.transfer_context.worker_transfer import create_transfer_context

from kvarena.reuse.plan import Chunk
from kvarena.reuse.store import StoreStats

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_FILLER_TOKEN = 0x7FFFFFFF
_BLOCK_TOKENS = 32
_POLL_S = 0.001
_NUM_THREADS = 4


@dataclass(frozen=True)
class KVGeometry:
    """Shape and dtype of a model's KV, and a name that no model with other KV has."""

    model_id: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype


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
        self._context: _Context | None = None
        self._down_until = 0.0
        self._lock = threading.RLock()

    def get_many(self, chunks: list[Chunk]) -> list[torch.Tensor | None]:
        nothing: list[torch.Tensor | None] = [None] * len(chunks)
        found = self._ask("get", lambda context: context.retrieve_many(chunks), default=nothing)
        found = [self._checked(chunk, kv) for chunk, kv in zip(chunks, found, strict=True)]
        hits = sum(kv is not None for kv in found)
        self.stats.hits += hits
        self.stats.misses += len(chunks) - hits
        return found

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
        with self._lock:
            if self._context:
                self._context.close()
            self._context = None

    def _ask(self, what: str, call: Callable[[_Context], Result], *, default: Result) -> Result:
        with self._lock:
            if time.monotonic() < self._down_until:
                self.stats.errors += 1
                return default
            try:
                self._context = self._context or _Context(self)
                return call(self._context)
            except (LMCacheSDKError, TimeoutError, RuntimeError, ValueError, OSError) as error:
                self._leave_alone(what, error)
                return default

    def _leave_alone(self, what: str, error: Exception) -> None:
        logger.warning(
            "LMCache at %s failed to %s (%s); not asked for %.0f s",
            self.url,
            what,
            error,
            self.retry_s,
        )
        self.stats.errors += 1
        self.close()
        self._down_until = time.monotonic() + self.retry_s

    def _checked(self, chunk: Chunk, kv: torch.Tensor | None) -> torch.Tensor | None:
        if kv is None:
            return None
        geometry = self.geometry
        expected = (2, geometry.num_layers, len(chunk), geometry.num_kv_heads * geometry.head_size)
        if tuple(kv.shape) != expected or kv.dtype != geometry.dtype:
            logger.warning("LMCache returned %s %s instead of %s", kv.dtype, tuple(kv.shape), expected)
            self.stats.errors += 1
            return None
        return kv


class _Context(LMCacheSDKContext):
    """The SDK's context with its geometry given by hand; the SDK itself reads it off a registered GPU engine."""

    def __init__(self, store: LMCacheStore) -> None:
        super().__init__(store.url, store.http_url, store.geometry.model_id, timeout=store.timeout_s)
        if self.chunk_size % _BLOCK_TOKENS:
            raise LMCacheSDKError(f"--chunk-size must be a multiple of {_BLOCK_TOKENS}, not {self.chunk_size}")
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="kvarena-lmcache")
        self._world_size = 1
        self._num_kv_readers = 1
        self._register(store.geometry)

    def close(self) -> None:
        self._threads.shutdown(wait=False)
        super().close()

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
        self._transfer_ctx = ContiguousTransferWrapper(transfer.engine_driven_context, self.chunk_size)

    def retrieve_many(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        """Chunks are asked for side by side: a round trip each, one after the other, would cost more than the data."""
        names = [f"kvarena-{uuid.uuid4().hex}" for _ in chunks]
        padded = [self._padded(chunk) for chunk in chunks]
        keys = [self._key(*call) for call in zip(chunks, padded, names, strict=True)]
        for answer in [self._req_client.lookup(key.no_worker_id_version(), 1) for key in keys]:
            answer.result(timeout=self.mq_timeout)
        asked = [self._req_client.query_prefetch_status(name) for name in names]
        held = [self._num_found(name, answer) for name, answer in zip(names, asked, strict=True)]

        def retrieve(i: int) -> torch.Tensor | None:
            if held[i] != len(padded[i]):
                return None
            kv = self.transfer_ctx.retrieve(self._key(chunks[i], padded[i], names[i], worker_id=0), self.instance_id)
            return None if kv is None else kv[:, :, : len(chunks[i])]

        found = list(self._threads.map(retrieve, range(len(chunks))))
        self._end(*names)
        return found

    def store_padded(self, chunk: Chunk, kv: torch.Tensor) -> bool:
        """Whether the server holds the chunk afterwards; `store` itself says no for one that it had already."""
        ids = self._padded(chunk)
        full = torch.nn.functional.pad(kv, (0, 0, 0, len(ids) - len(chunk)))
        return bool(self.store(full, ids, cache_salt=_server_salt(chunk.salt))) or self.holds(chunk)

    def holds(self, chunk: Chunk) -> bool:
        name, ids = f"kvarena-{uuid.uuid4().hex}", self._padded(chunk)
        self._req_client.lookup(self._key(chunk, ids, name).no_worker_id_version(), 1).result(timeout=self.mq_timeout)
        held = self._num_found(name, self._req_client.query_prefetch_status(name)) == len(ids)
        self._end(name)
        return held

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

    def _key(self, chunk: Chunk, ids: list[int], name: str, worker_id: int | None = None) -> Any:
        return self._create_key(ids, 0, len(ids), name, cache_salt=_server_salt(chunk.salt), worker_id=worker_id)


def _server_salt(salt: str) -> str:
    """LMCache forbids some characters in a salt; a digest has none of them."""
    return hashlib.blake2b(salt.encode(), digest_size=16).hexdigest() if salt else ""
