"""Which result files there are: those of the results folder, newest first, then those that came with the project."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class ResultFile:
    """`modified_ns` beside the path tells a file that was written anew from the one before."""

    path: Path
    name: str
    shipped: bool
    modified_ns: int

    @property
    def title(self) -> str:
        if self.shipped:
            return f"{self.name} · came with the project"
        return f"{self.name} · {datetime.fromtimestamp(self.modified_ns / 1e9):%Y-%m-%d %H:%M}"


def find_result_files(results_dir: Path, shipped_dir: Path) -> list[ResultFile]:
    """Every JSON file of the two folders and theirs, each once; whose it is, its content must say."""
    files = [*_files_of(results_dir, shipped=False), *_files_of(shipped_dir, shipped=True)]
    return list({file.path: file for file in reversed(files)}.values())[::-1]


def _files_of(folder: Path, shipped: bool) -> list[ResultFile]:
    paths = [path for path in folder.rglob("*.json") if path.is_file()]
    files = [
        ResultFile(path.resolve(), str(path.relative_to(folder)), shipped, path.stat().st_mtime_ns) for path in paths
    ]
    return sorted(files, key=lambda file: (-file.modified_ns, file.name))
