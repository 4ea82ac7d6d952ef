"""LMCache's second tier, behind the memory of its server: where it is, in the words of `lmcache server --l2-adapter`.

A folder outlives the server, and is the default: a second start finds the chunks of the first one. Redis and Valkey are
shared by the servers of several machines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any
from urllib.parse import urlsplit

from kvarena.contenders.servers import GIB

REDIS_PORT = 6379
L2_OPTION = "--l2-adapter"
NO_L2 = "none"
CHUNK_FILES = "*.data"
"""LMCache writes a file for each piece of a chunk, named for its model, its tokens and its salt."""
CHOICES = (
    f"{NO_L2}, redis://HOST[:PORT], valkey://HOST[:PORT], a folder, or a JSON object as LMCache's --l2-adapter takes it"
)


def l2_adapter(place: str, folder_gb: float, root: Path) -> dict[str, Any]:
    """The adapter for a setting: an address, a folder (from `root` if relative), or LMCache's own JSON.

    A folder is kept below `folder_gb` GiB (see `prune`); Redis and Valkey bound themselves (`maxmemory`). Raises
    `ValueError` with the choices, and for a password, which anybody could read in the server's command line.
    """
    if place.lstrip().startswith("{"):
        return _own(place)
    scheme, separator, _ = place.partition("://")
    if not separator:
        return folder_adapter(root / Path(place).expanduser(), folder_gb)
    if scheme not in ("redis", "valkey"):
        raise ValueError(f"must be {CHOICES}")
    return _redis(place)


def _redis(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    if parts.password:
        raise ValueError("must not hold a password; that is LMCACHE_L2_PASSWORD")
    try:
        port = parts.port or REDIS_PORT
    except ValueError as error:
        raise ValueError(f"must be {CHOICES}; {error}") from error
    if not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"must be {CHOICES}")
    adapter = {"type": "resp", "host": parts.hostname, "port": port}
    return adapter | ({"username": parts.username} if parts.username else {})


def folder_adapter(path: Path, folder_gb: float) -> dict[str, Any]:
    """LMCache counts what its present run writes, and nothing of what lies there already: each gets half."""
    return {
        "type": "fs_native",
        "base_path": str(path),
        "max_capacity_gb": folder_gb / 2,
        "eviction": {"eviction_policy": "LRU"},
    }


def _own(text: str) -> dict[str, Any]:
    try:
        adapter = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be {CHOICES}; this is no JSON: {error}") from error
    if not isinstance(adapter.get("type"), str):
        raise ValueError(f"must be {CHOICES}; this object has no type")
    return dict(adapter)


def folder_of(adapter: Mapping[str, Any] | None) -> Path | None:
    """The folder of a second tier that is one."""
    place = str((adapter or {}).get("base_path", ""))
    return Path(place) if place.startswith("/") else None


def adapter_of(command: Sequence[str]) -> dict[str, Any] | None:
    """The second tier in the command line of an LMCache server."""
    if L2_OPTION not in command:
        return None
    return dict(json.loads(command[list(command).index(L2_OPTION) + 1]))


def bound_bytes(adapter: Mapping[str, Any]) -> int:
    """Of a folder: what earlier runs left and what this one writes."""
    return int(2 * float(adapter.get("max_capacity_gb") or 0) * GIB)


def size_bytes(folder: Path) -> int:
    return sum(stat.st_size for stat in _chunk_files(folder).values())


def prune(adapter: Mapping[str, Any]) -> int:
    """Before LMCache starts: of what earlier runs left, the least recently used goes, down to half of the bound.

    Returns the bytes that were freed; 0 for tiers that aren't folders, and for those without a bound.
    """
    folder, bound = folder_of(adapter), bound_bytes(adapter)
    if folder is None or not bound:
        return 0
    files = _chunk_files(folder)
    excess = sum(stat.st_size for stat in files.values()) - bound // 2
    freed = 0
    for path in sorted(files, key=lambda path: max(files[path].st_atime, files[path].st_mtime)):
        if freed >= excess:
            break
        path.unlink(missing_ok=True)
        freed += files[path].st_size
    return freed


def clear_folder(folder: Path) -> int:
    """Removes all chunks; returns their bytes."""
    freed = 0
    for path, stat in _chunk_files(folder).items():
        path.unlink(missing_ok=True)
        freed += stat.st_size
    return freed


def _chunk_files(folder: Path) -> dict[Path, os.stat_result]:
    """LMCache evicts files while they are listed: one that has gone is left out."""
    found: dict[Path, os.stat_result] = {}
    for path in folder.glob(CHUNK_FILES):
        with suppress(FileNotFoundError):
            found[path] = path.stat()
    return {path: stat for path, stat in found.items() if S_ISREG(stat.st_mode)}
