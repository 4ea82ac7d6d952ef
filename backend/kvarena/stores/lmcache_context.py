"""A connection to an LMCache server through its public SDK: looking up, taking, releasing and storing chunks.

LMCache keeps whole pieces of `--chunk-size` tokens and drops the rest. So a chunk is cut into pieces of one token less,
and each is filled up with a token that no vocabulary has; the last one with as many as it lacks. In the row of a
piece's last token are its checksum (`PieceChecksum`) and its tokens' scores. A piece that fails the check is dropped
from the server.

What the server locked for a call that it didn't answer in time can only be released over the same connection, once it
answers: `stranded`. When a connection is given up, and when this is done, is decided in `kvarena.stores.lmcache`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from http import HTTPStatus
from typing import Any

import numpy as np
import numpy.typing as npt
import requests
import torch
import zmq
from lmcache.sdk.context import LMCacheSDKContext, LMCacheSDKError
from lmcache.sdk.wrapper.contiguous import ContiguousTransferWrapper
from lmcache.v1.gpu_connector.utils import LayoutHints
from lmcache.v1.multiprocess.cache_control.key_resolver import resolve_object_keys
from lmcache.v1.multiprocess.futures import MessagingFuture
from lmcache.v1.multiprocess.token_hasher import TokenHasher
from lmcache.v1.multiprocess.transfer_context.worker_transfer import create_transfer_context

from kvarena.core.devices import begin_thread
from kvarena.core.plan import Chunk
from kvarena.core.store import Piece, Pieces, Scores, joined

_FILLER_TOKEN = 0x7FFFFFFF
_BLOCK_TOKENS = 32
_POLL_S = 0.001
_RESTART_CHECK_S = 1.0
_NUM_THREADS = 4
PING_TIMEOUT_S = 5.0
_GIVE_UP_S = 30.0


def piece_names(owner: str, chunk: Chunk, piece_tokens: int) -> list[int]:
    """A number for each piece of a chunk, by owner, salt, sink, and all tokens up to the piece's end. Chunks that begin
    alike share pieces, and their names.
    """
    digest = hashlib.blake2b(owner.encode() + b"\0" + chunk.salt.encode(), digest_size=8, person=b"kvarena-piece")
    if len(chunk.sink):
        digest.update(b"\0sink\0" + chunk.sink.tobytes())
    names = []
    for start in range(0, len(chunk), piece_tokens):
        digest.update(chunk.token_ids[start : start + piece_tokens].tobytes())
        names.append(int.from_bytes(digest.digest(), "little"))
    return names


_STEPS, _ZERO = 8, 160
"""A score `s` is kept as `8 log2(s) + 160`: from 1e-6 to 3,000 to within 5 %."""
_HAS_TWO = 128
"""Added to the number of prompts. Entries of earlier versions have it without, and one score for each token."""


@dataclass(frozen=True)
class PieceChecksum:
    """In pieces of one shape `(2, L, t, H_kv * D)` and dtype: what is taken is what was put, whatever happened to
    memory or disk in between.

    A piece's last row belongs to no token. Its 64-bit words, each times an odd weight of its place, sum up (mod 2**64)
    to the piece's name: the first word of that row is chosen so. This reads the piece once, as fast as memory gives it.
    It notices every change of one word, words and pieces that changed places, and pieces that were never written. It is
    no protection against somebody who forges KV. The same row of the first layer's values has the scores of the piece's
    tokens, where a row has room for them: how many prompts showed them, and two bytes for each. A row has a whole
    number of 64-bit words.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype

    def seal(self, piece: torch.Tensor, name: int, scores: Scores | None = None) -> None:
        """Writes the last row of a piece, which may be a view. `scores` are those of its own tokens."""
        row = piece[0, 0, -1].view(torch.int64).numpy().view(np.uint64)
        row[:] = 0
        if self._has_room:
            own = self._score_bytes(piece)
            own[:] = 0
        if scores and self._has_room:
            flat = scores.mean.flatten()
            own[0] = _HAS_TWO + scores.num_prompts
            own[1 : len(flat) + 1] = flat.log2().mul(_STEPS).round().add(_ZERO).clamp(0, 255).byte()
        row[0] = (name - self._sum(piece)) % 2**64

    def is_sound(self, piece: torch.Tensor, name: int) -> bool:
        return (tuple(piece.shape), piece.dtype) == (self.shape, self.dtype) and self._sum(piece) == name

    def scores_in(self, piece: torch.Tensor, num_tokens: int) -> Scores | None:
        """Of a sound piece that has so many tokens of a chunk."""
        own = self._score_bytes(piece)
        if not self._has_room or own[0] < _HAS_TWO:
            return None
        kept = own[1 : 2 * num_tokens + 1].view(num_tokens, 2)
        return Scores(((kept.float() - _ZERO) / _STEPS).exp2(), int(own[0]) - _HAS_TWO)

    @staticmethod
    def _score_bytes(piece: torch.Tensor) -> torch.Tensor:
        return piece[1, 0, -1].view(torch.uint8)

    @property
    def _has_room(self) -> bool:
        return self.shape[3] * self.dtype.itemsize >= 2 * self.shape[2] - 1

    def _sum(self, piece: torch.Tensor) -> int:
        words = piece.reshape(-1).view(torch.int64).numpy().view(np.uint64)
        return int(np.einsum("i,i", words, self._weights))

    @cached_property
    def _weights(self) -> npt.NDArray[np.uint64]:
        """The mixing function of SplitMix64, made odd; 1 for the word that is chosen."""
        num_rows, row_words = math.prod(self.shape[:3]), self.shape[3] * self.dtype.itemsize // 8
        mixed = np.arange(1, num_rows * row_words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        weights = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
        weights[(self.shape[2] - 1) * row_words] = 1
        return weights


@dataclass(frozen=True)
class KVGeometry:
    """Shape and dtype of a model's KV, and a name that is this KV's alone."""

    model_id: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype


class ServerRestarted(LMCacheSDKError):
    """The server isn't the one that this context registered with."""


class ChunkLost(LMCacheSDKError):
    """A chunk was dropped to be stored with its scores, and found no room any more."""


@dataclass(frozen=True)
class Lookup:
    """A chunk's look-up: its session at the server, its filled-up token ids, and how many of these the server has; None
    until that is known.

    The server locks what it finds against eviction, until that is taken and given back, or freed.
    """

    chunk: Chunk
    session: str
    padded: list[int]
    num_found: int | None = None

    @property
    def is_held(self) -> bool:
        return self.num_found == len(self.padded)


@dataclass
class AtServer:
    """What has to be released there: look-ups, those of them that were taken, and the pieces to drop, which are corrupt
    or unwanted. `scores` are those of chunks that were taken.

    `asked`, `freed` and `ended` are the server's answers: to the look-ups, to the release of what they locked, and to
    the end of their sessions. Each is asked for once, however long the answer takes.
    """

    lookups: list[Lookup] = field(default_factory=list)
    taken: list[Lookup] = field(default_factory=list)
    corrupt: list[tuple[Lookup, list[int]]] = field(default_factory=list)
    scores: dict[Chunk, Scores] = field(default_factory=dict)
    asked: list[MessagingFuture[None]] = field(default_factory=list)
    freed: list[MessagingFuture[Any]] | None = None
    ended: list[MessagingFuture[None]] | None = None


class LMCacheContext(LMCacheSDKContext):
    """The SDK's context with its geometry given by hand; the SDK itself reads it off a registered GPU engine."""

    def __init__(
        self, geometry: KVGeometry, url: str, http_url: str, timeout_s: float, device: torch.device | None = None
    ) -> None:
        self.num_retrievals = 0
        self.stranded: list[AtServer] = []
        """What couldn't be released because the server didn't answer."""
        self.retired_at: float | None = None
        self._answered_at: float | None = None
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "kvarena-lmcache", begin_thread, (device,))
        self._engine_driven: Any = None
        self._reading: Counter[Chunk] = Counter()
        self._reading_lock = threading.Lock()
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
        """Gives back sockets, threads and the server's memory, unless a tensor there is still in use."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(BufferError):
            if self._engine_driven is not None:
                self._engine_driven.close()
        if (client := getattr(self, "_req_client", None)) is not None:
            client.close()
        if (sockets := getattr(self, "_sockets", None)) is not None:
            sockets.destroy(linger=0)

    def retire(self) -> None:
        """Unregisters, so that the server frees what a failed call may have kept, and closes."""
        with contextlib.suppress(Exception):
            self._req_client.unregister_kv_cache_engine_driven_context(self.instance_id).result(timeout=self.mq_timeout)
        self.close()

    def ping(self) -> None:
        """Tells the server that this context is alive. Raises `TimeoutError` when no answer comes, and
        `ServerRestarted` when another server answers.
        """
        self._req_client.ping(self.instance_id).result(timeout=PING_TIMEOUT_S)
        if self._server_instance() != self._server:
            raise ServerRestarted("it was started anew")

    @property
    def _zmq_context(self) -> zmq.Context[Any]:
        return self._sockets

    @_zmq_context.setter
    def _zmq_context(self, context: zmq.Context[Any]) -> None:
        """Closing must not wait to deliver messages to a dead server."""
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
        width = geometry.num_kv_heads * geometry.head_size
        self._checksum = PieceChecksum((2, geometry.num_layers, self.chunk_size, width), geometry.dtype)
        transfer.register(layers, self._model_name, 1, blocks, self.mq_timeout, layout_hints=hints)
        self._engine_driven = transfer.engine_driven_context
        self._transfer_ctx = ContiguousTransferWrapper(self._engine_driven, self.chunk_size)

    @property
    def _piece_tokens(self) -> int:
        """Of a chunk, in each of the server's pieces."""
        return int(self.chunk_size) - 1

    def look_up(self, chunks: Sequence[Chunk], at_server: AtServer) -> list[Lookup]:
        """All at once: one round trip after the other would cost more than the data. `at_server` has what is to be
        released, even if this raises.
        """
        at_server.lookups = [Lookup(chunk, f"kvarena-{uuid.uuid4().hex}", self._padded(chunk)) for chunk in chunks]
        deadline = time.monotonic() + self.mq_timeout
        keys = [self._key(lookup).no_worker_id_version() for lookup in at_server.lookups]
        at_server.asked = [self._req_client.lookup(key, 1) for key in keys]
        for answer in at_server.asked:
            answer.result(timeout=_left(deadline))
        found = self._nums_found(at_server.lookups, deadline)
        at_server.lookups = [replace(of, num_found=n) for of, n in zip(at_server.lookups, found, strict=True)]
        if not any(lookup.is_held for lookup in at_server.lookups):
            try:
                self._notice_restart()
            except ServerRestarted:
                self.release(at_server)
                raise
        return at_server.lookups

    def _notice_restart(self) -> None:
        """A restarted server doesn't know this context, and finds nothing for it."""
        if time.monotonic() < self._checked_at + _RESTART_CHECK_S:
            return
        self._checked_at = time.monotonic()
        if self._server_instance() != self._server:
            raise ServerRestarted("it was started anew")

    def _server_instance(self) -> str:
        """A name for the server's present run."""
        return str(self._server_config()["instance_id"])

    def _server_config(self) -> dict[str, Any]:
        answer = requests.get(f"{self._http_url}/config", timeout=self.mq_timeout)
        answer.raise_for_status()
        config: dict[str, Any] = answer.json()["mp"]
        return config

    def take(self, lookups: Sequence[Lookup], at_server: AtServer) -> list[Pieces | None]:
        """None for what isn't held or is corrupt. `at_server` has what is to be released, even if this raises."""
        taking = [self._threads.submit(self._take, lookup, at_server) for lookup in lookups]
        try:
            return [each.result() for each in taking]
        finally:
            for each in taking:
                each.cancel()
            wait(taking)  # what is asked for only now would be asked for after its release

    def _take(self, lookup: Lookup, at_server: AtServer) -> Pieces | None:
        if not lookup.is_held:
            return None
        with self._reading_lock:
            self._reading[lookup.chunk] += 1
            at_server.taken.append(lookup)
        slots = self._engine_driven.prepare_retrieve(self._read_key(lookup), self.instance_id) or []
        names = self._names(lookup.chunk)
        if len(slots) != len(names):
            raise LMCacheSDKError(f"{len(slots)} of {len(names)} pieces came of a chunk that it held")
        sound = [self._checksum.is_sound(slot, name) for slot, name in zip(slots, names, strict=True)]
        if not all(sound):
            at_server.corrupt.append((lookup, [number for number, is_sound in enumerate(sound) if not is_sound]))
            return None
        rest = len(lookup.chunk) - (len(slots) - 1) * self._piece_tokens
        sizes = [*[self._piece_tokens] * (len(slots) - 1), rest]
        scores = [self._checksum.scores_in(slot, size) for slot, size in zip(slots, sizes, strict=True)]
        known = [own for own in scores if own]
        if len(known) == len(slots):
            least = min(own.num_prompts for own in known)
            at_server.scores[lookup.chunk] = Scores(torch.cat([own.mean for own in known]), least)
        return [Piece(slot, size) for slot, size in zip(slots, sizes, strict=True)]

    def release(self, at_server: AtServer) -> None:
        """Unlock what was taken, and what was only looked up: ending a session frees no lock. What is corrupt is
        dropped, for it would keep a sound copy from being stored. Raises `TimeoutError` where an answer is missing; the
        rest is left to `release_stranded`.
        """
        try:
            self._release(at_server, self.mq_timeout)
        except TimeoutError:
            self.stranded.append(at_server)
            raise

    def release_stranded(self, present: LMCacheContext | None) -> None:
        """Release what `release` couldn't. It has to be over this connection, which alone gets the server's answers, in
        their order. Answers are given up that belong to an earlier run of the server than that of `present`, or that
        are missing `_GIVE_UP_S` after the server began to answer again.
        """
        self._answered_at = self._answered_at or time.monotonic()
        is_late = time.monotonic() > self._answered_at + _GIVE_UP_S
        if is_late or (present is not None and present._server != self._server):
            for at_server in self.stranded:
                at_server.asked, at_server.freed, at_server.ended = [], at_server.freed and [], at_server.ended and []
        while self.stranded:
            self._release(self.stranded[0], PING_TIMEOUT_S)  # nobody waits for it
            del self.stranded[0]

    def _release(self, at_server: AtServer, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        _wait_for(at_server.asked, deadline)
        if at_server.freed is None:
            # What a look-up locks is known, and can be freed, once it has ended.
            self._nums_found([lookup for lookup in at_server.lookups if lookup.num_found is None], deadline)
            at_server.freed = self._free(at_server)
        _wait_for(at_server.freed, deadline)
        if at_server.ended is None:
            at_server.ended = [self._req_client.end_session(lookup.session) for lookup in at_server.lookups]
        _wait_for(at_server.ended, deadline)
        while at_server.corrupt:
            self._drop(*at_server.corrupt.pop())

    def _free(self, at_server: AtServer) -> list[MessagingFuture[Any]]:
        with self._reading_lock:
            self._reading.subtract(lookup.chunk for lookup in at_server.taken)
            # The server knows one reader of a chunk by name, and takes nothing back from a second one.
            last = [lookup for lookup in at_server.taken if not self._reading[lookup.chunk]]
            self._reading -= Counter()
        given_back = [self._req_client.commit_retrieve(self._read_key(of), self.instance_id) for of in last]
        sessions = {lookup.session for lookup in last}
        locked = [of for of in at_server.lookups if of.num_found != 0 and of.session not in sessions]
        freed = [self._req_client.free_lookup_locks(self._key(of).no_worker_id_version(), 1) for of in locked]
        return [*given_back, *freed]

    def _drop(self, lookup: Lookup, numbers: Sequence[int]) -> None:
        """Delete pieces of a chunk from all tiers, unless others are reading them, who will notice by themselves."""
        hasher = TokenHasher(self.chunk_size, self._server_config()["hash_algorithm"])
        salt = _server_salt(lookup.chunk)
        keys, _ = resolve_object_keys(hasher, self._model_name, self._world_size, lookup.padded, salt)
        named = [asdict(keys[number].to_encoded_object_key()) for number in numbers]
        for tier in ("l1", "l2"):
            request = {"keys": named, "tier": tier}
            answer = requests.delete(f"{self._http_url}/cache/objects", json=request, timeout=self.mq_timeout)
            if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE:  # there is no second tier
                answer.raise_for_status()

    def store_padded(self, chunk: Chunk, kv: torch.Tensor, scores: Scores | None = None) -> bool:
        """Store a chunk, and return whether the server then holds it. `store` itself doesn't tell: it says no for a
        chunk that was there already, and yes for one that found no room. Tries twice, for a corrupt copy may be there.
        """
        ids = self._padded(chunk)
        full = kv.new_zeros((*kv.shape[:2], len(ids), kv.shape[3]), device="cpu")
        means = scores.mean.split(self._piece_tokens) if scores else itertools.repeat(None)
        pieces = zip(
            full.split(self.chunk_size, dim=2),
            kv.cpu().split(self._piece_tokens, dim=2),
            self._names(chunk),
            means,
            strict=False,
        )
        for piece, own, name, mean in pieces:
            piece[:, :, : own.shape[2]] = own
            self._checksum.seal(piece, name, Scores(mean, scores.num_prompts) if scores and mean is not None else None)
        for _ in range(2):
            self.store(full, ids, cache_salt=_server_salt(chunk))
            if self.holds(chunk, with_scores=scores is not None):
                return True
        return False

    def add_scores(self, chunk: Chunk, scores: torch.Tensor) -> bool:
        """Whether the entry then has these scores. An entry can't be changed: it is dropped, and stored anew with the
        scores of one more prompt. While somebody else reads it, it stays as it is. Raises `ChunkLost`.
        """
        at_server = AtServer()
        try:
            (lookup,) = self.look_up([chunk], at_server)
            (pieces,) = self.take([lookup], at_server)
            if pieces is None:
                return False
            kv = joined(pieces)
            known = Scores.with_one_more(at_server.scores.get(chunk), scores)
            at_server.corrupt.append((lookup, list(range(len(pieces)))))
        finally:
            self.release(at_server)
        if self.store_padded(chunk, kv, known):
            return True
        if not self.holds(chunk):
            raise ChunkLost(f"a chunk of {len(chunk)} tokens was dropped to get its scores, and found no room again")
        return False

    def holds(self, chunk: Chunk, *, with_scores: bool = False) -> bool:
        """Whether the server has the chunk, intact."""
        at_server = AtServer()
        try:
            is_there = self.take(self.look_up([chunk], at_server), at_server) != [None]
            return is_there and (chunk in at_server.scores or not with_scores)
        finally:
            self.release(at_server)

    def clear_server(self) -> None:
        requests.post(f"{self._http_url}/cache/clear", timeout=self.mq_timeout).raise_for_status()

    def _nums_found(self, lookups: Sequence[Lookup], deadline: float) -> list[int]:
        asked = [self._req_client.query_prefetch_status(lookup.session) for lookup in lookups]
        return [self._num_found(*call, deadline) for call in zip(lookups, asked, strict=True)]

    def _num_found(self, lookup: Lookup, answer: Any, deadline: float) -> int:
        """The tokens that a look-up found; asks again until the server has finished it."""
        while (pieces := answer.result(timeout=_left(deadline))) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"lookup took longer than {self.mq_timeout} s")
            time.sleep(_POLL_S)
            answer = self._req_client.query_prefetch_status(lookup.session)
        return int(pieces * self.chunk_size)

    def _padded(self, chunk: Chunk) -> list[int]:
        ids: list[int] = chunk.token_ids.tolist()
        pieces = [ids[start : start + self._piece_tokens] for start in range(0, len(ids), self._piece_tokens)]
        return [id for piece in pieces for id in piece + [_FILLER_TOKEN] * (self.chunk_size - len(piece))]

    def _names(self, chunk: Chunk) -> list[int]:
        return piece_names(self._model_name, chunk, self._piece_tokens)

    def _read_key(self, lookup: Lookup) -> Any:
        return self._key(lookup, worker_id=0)

    def _key(self, lookup: Lookup, worker_id: int | None = None) -> Any:
        ids, salt = lookup.padded, _server_salt(lookup.chunk)
        return self._create_key(ids, 0, len(ids), lookup.session, cache_salt=salt, worker_id=worker_id)


def _left(deadline: float) -> float:
    """The seconds until then: many answers together get no more time than one."""
    return max(0.0, deadline - time.monotonic())


def _wait_for(answers: Sequence[MessagingFuture[Any]], deadline: float) -> None:
    """Raises `TimeoutError` where one is missing. A refusal counts as an answer: then there is nothing to release."""
    for answer in answers:
        if not answer.wait(_left(deadline)):
            raise TimeoutError("no answer in time")


def _server_salt(chunk: Chunk) -> str:
    """Keeps chunks apart by salt and sink. LMCache forbids some characters in a salt, so it gets a digest."""
    own = chunk.salt.encode() + (b"\0sink\0" + chunk.sink.tobytes() if len(chunk.sink) else b"")
    return hashlib.blake2b(own, digest_size=16).hexdigest() if own else ""
