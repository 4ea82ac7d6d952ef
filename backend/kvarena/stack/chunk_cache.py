"""The chunk cache as a whole: filling it, how much of it is on disk, and emptying it.

`warm` asks the blend for each chunk of a folder whether the store has it, sends those that are missing, and looks
again: what it says is what the store said at the end.

Chunks are kept in the LMCache server's memory and in its second tier. That is a folder unless another was chosen;
others are emptied by their own tools. What vLLM's own prefix caches hold stays until their servers are restarted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from kvarena.client import API_KEY_VARIABLE, ChunkOutcome, Client, ClientError, Outcome, Refused
from kvarena.contenders.servers import GIB
from kvarena.contenders.spec import LMCACHE_SERVER
from kvarena.documents import Remark, TextChunk
from kvarena.home import Home, StackError
from kvarena.stack import lmcache_l2
from kvarena.stack.record import Record
from kvarena.stack.supervisord import running_supervisor

NUM_PARALLEL_WARM_REQUESTS = 4


@dataclass(frozen=True)
class WarmResult:
    """A chunk is too short when it has so few tokens that the blend doesn't keep it: it is computed each time.

    `unusable` are the folder's files that no chunks could be made of.
    """

    outcomes: tuple[ChunkOutcome, ...]
    unusable: tuple[Remark, ...] = ()

    def chunks(self, outcome: Outcome) -> tuple[ChunkOutcome, ...]:
        return tuple(chunk for chunk in self.outcomes if chunk.outcome == outcome)

    def count(self, outcome: Outcome) -> int:
        return len(self.chunks(outcome))

    @property
    def failures(self) -> tuple[ChunkOutcome, ...]:
        return self.chunks("failed")

    def to_json(self) -> dict[str, Any]:
        return {
            "num_chunks": len(self.outcomes),
            "num_warmed": self.count("warmed"),
            "num_already_there": self.count("already_there"),
            "num_too_short": self.count("too_short"),
            "num_failed": self.count("failed"),
            "too_short": [chunk.name for chunk in self.chunks("too_short")],
            "failures": [{"chunk": failed.name, "reason": failed.reason} for failed in self.failures],
            "unusable": [{"file": remark.file, "reason": remark.text} for remark in self.unusable],
        }


def warm(
    base_url: str,
    model: str,
    chunks: Sequence[TextChunk],
    on_chunk: Callable[[ChunkOutcome], None] = lambda outcome: None,
    api_key: str = "",
    system: str | None = None,
) -> WarmResult:
    """Sends the chunks, a few at a time; one that is refused doesn't stop the others. With `system`, chats that have
    this system prompt find their beginning there, too.

    `on_chunk` is called after each, and once more for a chunk that later ones took the room of. Raises `ClientError`
    when the server doesn't answer at all, or isn't a blend, and `StackError` when it serves its model without blending,
    isn't ours, or asks for another key.
    """
    with Client(base_url, api_key) as client:
        try:
            offer = client.get("/kvarena")
        except Refused as error:
            if error.status == HTTPStatus.NOT_FOUND:
                reason = "LMCache's own blender has no chunk cache to fill ahead: it stores what requests bring"
                raise StackError(reason) from error
            if error.status == HTTPStatus.UNAUTHORIZED:
                raise StackError(f"{base_url} refuses {API_KEY_VARIABLE}: {error.reason}") from error
            raise
        if not offer.get("blends", True):
            raise StackError(f"the chunk cache stays empty: {offer.get('reason')}")
        separator = str(offer.get("separator", ""))
        outcomes = client.warm(model, chunks, separator, NUM_PARALLEL_WARM_REQUESTS, on_chunk)
        if system is not None:
            client.warm_beginning(model, system, separator)
        return WarmResult(tuple(outcomes))


def compute_contexts(
    base_url: str,
    model: str,
    chunks: Sequence[TextChunk],
    on_prompt: Callable[[str, int, int], None],
    api_key: str = "",
) -> None:
    """What takes longer than filling the cache: the scores of its chunks where the server's own policy reads them, then
    their seams where it takes these. `on_prompt` gets what is under way, and how many prompts of how many are done.
    """
    with Client(base_url, api_key) as client:
        offer = client.get("/kvarena")
        separator = str(offer.get("separator", ""))
        if offer.get("reads_scores"):
            client.score(model, chunks, separator, partial(on_prompt, "finding which tokens need their context"))
        if offer.get("seams"):
            client.make_seams(model, chunks, separator, partial(on_prompt, "computing chunks after the chunk before"))


CLEAR_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class OnDisk:
    """The folder behind LMCache's memory. `bound_bytes` is 0 where nobody set a bound."""

    folder: str
    size_bytes: int
    bound_bytes: int

    def as_text(self) -> str:
        bound = f" of at most {self.bound_bytes / GIB:.3g} GiB" if self.bound_bytes else ""
        return f"Chunks on disk: {self.size_bytes / 2**20:.0f} MiB{bound} in {self.folder}"


@dataclass(frozen=True)
class Cleared:
    """`second_tier` is one that isn't a folder, and was left alone; empty where there is none."""

    memory: bool
    folder: str
    folder_bytes: int
    second_tier: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        memory = "LMCache's memory is empty" if self.memory else "No LMCache server is running"
        lines = [f"{memory}; {self.folder_bytes / 2**20:.0f} MiB removed from {self.folder}."]
        if self.second_tier:
            lines.append(f"The second tier ({self.second_tier}) keeps its chunks, and goes on answering.")
        if self.memory:
            lines.append("vLLM's own prefix caches keep theirs until a restart: ./run-server.sh restart NAME")
        return "\n".join(lines)


def on_disk(record: Record) -> OnDisk | None:
    """What a running stack keeps on the disk; `None` where its second tier is no folder of this machine."""
    server = record.service(LMCACHE_SERVER)
    adapter = lmcache_l2.adapter_of(server.command) if server and not record.compose else None
    folder = lmcache_l2.folder_of(adapter)
    if adapter is None or folder is None:
        return None
    return OnDisk(str(folder), lmcache_l2.size_bytes(folder), lmcache_l2.bound_bytes(adapter))


def clear(home: Home) -> Cleared:
    """Empties the memory of the running LMCache server, and the folder. Raises `StackError` when the server refuses."""
    record, supervisor = running_supervisor(home)
    server = record.service(LMCACHE_SERVER) if record and supervisor else None
    adapter = lmcache_l2.adapter_of(server.command) if server else None
    folder = lmcache_l2.folder_of(adapter) or home.chunks
    if server:
        _clear_memory(server.health_url.rsplit("/", 1)[0])
    other = str(adapter["type"]) if adapter and lmcache_l2.folder_of(adapter) is None else ""
    return Cleared(server is not None, str(folder), _clear_folder(folder), other)


def _clear_memory(url: str) -> None:
    try:
        with Client(url, timeout_s=CLEAR_TIMEOUT_S) as client:
            client.post("/cache/clear", {})
    except ClientError as error:
        raise StackError(f"the LMCache server at {url} could not be emptied: {error}") from error


def _clear_folder(folder: Path) -> int:
    try:
        return lmcache_l2.clear_folder(folder)
    except OSError as error:
        raise StackError(f"{folder} could not be emptied: {error.strerror}") from error
