"""A connection to an LMCache server through its public SDK, with a model's geometry given by hand.

LMCache keeps whole pieces of `--chunk-size` tokens and drops the rest, so a chunk is filled up with tokens that no
vocabulary has.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests
import torch
import zmq
from lmcache.sdk.context import LMCacheSDKContext, LMCacheSDKError
from lmcache.sdk.wrapper.contiguous import ContiguousTransferWrapper
from lmcache.v1.gpu_connector.utils import LayoutHints
from lmcache.v1.multiprocess.transfer_context.worker_transfer import create_transfer_context

from kvarena.reuse.plan import Chunk
from kvarena.reuse.store import Pieces

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
