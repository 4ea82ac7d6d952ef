"""The result files that a report is made of."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarena.bench.results import Row, load_results

DEFAULT = "results/*.json"


@dataclass(frozen=True)
class ResultFile:
    """`name` is the path as it was given: what tells files of one benchmark apart."""

    name: str
    result: Mapping[str, Any]

    @property
    def benchmark(self) -> str:
        return str(self.settings.get("benchmark", ""))

    @property
    def rows(self) -> list[Row]:
        return list(self.result["rows"])

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._object("settings")

    @property
    def versions(self) -> Mapping[str, Any]:
        return self._object("versions")

    @property
    def machine(self) -> Mapping[str, Any]:
        return self._object("machine")

    @property
    def summary(self) -> str:
        """Which benchmark, of what, where; such as `eval · town · Xeon · 2 cores`."""
        cores = self.machine.get("num_cores")
        model = self.settings.get("shape") or self.settings.get("model")
        parts = (self.benchmark, model, self.machine.get("cpu"), f"{cores} cores" if cores else None)
        return " · ".join(str(part) for part in parts if part)

    def _object(self, key: str) -> Mapping[str, Any]:
        found = self.result.get(key) or {}
        assert isinstance(found, Mapping), f"{key} of {self.name} was checked"
        return found


def read_files(given: Sequence[str]) -> list[ResultFile]:
    """Result files by path, folder or pattern, each once. Raises `ValueError` naming what is missing or no result."""
    paths = dict.fromkeys(path for one in given or [DEFAULT] for path in _paths(one))
    return [ResultFile(str(path), _checked(path)) for path in paths]


def _paths(given: str) -> list[Path]:
    path = Path(given).expanduser()
    if path.is_file():
        return [path]
    pattern = str(Path(glob.escape(str(path))) / "*.json") if path.is_dir() else str(path)
    found = [Path(one) for one in sorted(glob.glob(pattern)) if Path(one).is_file()]
    if not found:
        raise ValueError(f"no result files at {given}; kvarena bench and kvarena eval write them to results/")
    return found


def _checked(path: Path) -> dict[str, Any]:
    result = load_results(path)
    if not all(isinstance(row, dict) for row in result["rows"]):
        raise ValueError(f"{path} is no result file: a row isn't an object")
    for key in ("settings", "versions", "machine"):
        if not isinstance(result.get(key) or {}, dict):
            raise ValueError(f"{path} is no result file: {key} isn't an object")
    return result
