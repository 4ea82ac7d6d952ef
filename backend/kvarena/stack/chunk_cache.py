"""The chunk cache as a whole: how much of it lies on the disk, and emptying it.

Chunks lie in the LMCache server's memory and in its second tier. That is a folder unless another was chosen; others are
emptied by their own tools. What vLLM's own prefix caches hold stays until their servers are restarted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from kvarena.stack import lmcache_l2
from kvarena.stack.errors import StackError
from kvarena.stack.home import Home
from kvarena.stack.record import Record
from kvarena.stack.service import LMCACHE_SERVER
from kvarena.stack.supervision import running_supervisor

CLEAR_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class OnDisk:
    """The folder behind LMCache's memory. `bound_bytes` is 0 where nobody set a bound."""

    folder: str
    size_bytes: int
    bound_bytes: int

    def as_text(self) -> str:
        bound = f" of at most {self.bound_bytes / 2**30:.3g} GiB" if self.bound_bytes else ""
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
            lines.append("vLLM's own prefix caches keep theirs until a restart: ./run-server.sh restart blend")
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
        httpx.post(f"{url}/cache/clear", json={}, timeout=CLEAR_TIMEOUT_S, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise StackError(
            f"the LMCache server at {url} could not be emptied: {error or type(error).__name__}"
        ) from error


def _clear_folder(folder: Path) -> int:
    try:
        return lmcache_l2.clear_folder(folder)
    except OSError as error:
        raise StackError(f"{folder} could not be emptied: {error.strerror}") from error
