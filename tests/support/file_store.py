"""A `ChunkStore` over a folder, for processes to share, and for tests to damage."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from kvarena.core.plan import Chunk
from kvarena.core.store import FoundKV, StoreStats


class FileStore:
    """With `is_down` it fails as a store does that can't be reached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stats = StoreStats()
        self.is_down = False

    @contextmanager
    def retrieval(self, chunks: Sequence[Chunk]) -> Iterator[FoundKV]:
        yield FoundKV([self._get(chunk) for chunk in chunks])

    def put(self, chunk: Chunk, kv: torch.Tensor) -> bool:
        if self.is_down:
            self.stats.errors += 1
            return False
        part = self.path(chunk).with_suffix(".part")
        torch.save(kv, part)
        part.replace(self.path(chunk))
        self.stats.puts += 1
        return True

    def clear(self) -> None:
        for path in self.paths():
            path.unlink()

    def close(self) -> None:
        """Files stay."""

    def path(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.key.hex()}.kv"

    def paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.kv"))

    def _get(self, chunk: Chunk) -> torch.Tensor | None:
        self.stats.errors += self.is_down
        try:
            kv: torch.Tensor | None = None if self.is_down else torch.load(self.path(chunk))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            kv = None
        self.stats.hits += kv is not None
        self.stats.misses += kv is None
        return kv
