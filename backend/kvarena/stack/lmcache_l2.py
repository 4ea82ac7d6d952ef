"""LMCache's second tier, behind the memory of its server: where it is, in the words of `lmcache server --l2-adapter`.

A folder outlives the server; Redis and Valkey are shared by the servers of several machines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

REDIS_PORT = 6379
CHOICES = "redis://HOST[:PORT], valkey://HOST[:PORT], a folder, or a JSON object as LMCache's --l2-adapter takes it"


def l2_adapter(place: str, folder_gb: float, root: Path) -> dict[str, Any]:
    """The adapter for a setting: an address, a folder (from `root` if relative), or LMCache's own JSON.

    LMCache keeps a folder below `folder_gb` GiB of what one run of its server writes; Redis and Valkey bound
    themselves (`maxmemory`). Raises `ValueError` with the choices, and for a password, which anybody could read in the
    server's command line.
    """
    if place.lstrip().startswith("{"):
        return _own(place)
    scheme, separator, _ = place.partition("://")
    if not separator:
        return _folder(root / Path(place).expanduser(), folder_gb)
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


def _folder(path: Path, folder_gb: float) -> dict[str, Any]:
    return {
        "type": "fs_native",
        "base_path": str(path),
        "max_capacity_gb": folder_gb,
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
