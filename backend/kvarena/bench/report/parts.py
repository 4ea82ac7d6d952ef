"""What a report is made of: result files, tables to copy, and sections by topic with a block for every file.

A table has the rows as they are in the file, nested figures in columns of their own.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarena.bench.results import Row, load_results
from kvarena.panels.kinds import result_summary
from kvarena.panels.panel import Colours, Panel

DEFAULT_PATTERN = "results/*.json"


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
        return result_summary(self.result)

    def _object(self, key: str) -> Mapping[str, Any]:
        found = self.result.get(key) or {}
        assert isinstance(found, Mapping), f"{key} of {self.name} was checked"
        return found


def read_files(given: Sequence[str]) -> list[ResultFile]:
    """Result files by path, folder or pattern, each once. Raises `ValueError` naming what is missing or no result."""
    paths = dict.fromkeys(path for one in given or [DEFAULT_PATTERN] for path in _paths(one))
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


Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """None is an empty cell."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_markdown(self) -> str:
        lines = [self.columns, ["---" for _ in self.columns], *self.rows]
        return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)


def rows_table(caption: str, rows: Iterable[Mapping[str, Any]], keys: Sequence[str] = ()) -> Table:
    """A column for each figure of these keys, by default of all; columns without a single value are left out."""
    flat_rows = [flat({key: row[key] for key in keys if key in row} if keys else row) for row in rows]
    columns = [column for column in _in_order(flat_rows, keys) if any(row.get(column) is not None for row in flat_rows)]
    return Table(caption, tuple(columns), tuple(tuple(row.get(column) for column in columns) for row in flat_rows))


def pairs_table(caption: str, values: Mapping[str, Any]) -> Table:
    """A line for each value, such as a file's settings."""
    return Table(caption, ("name", "value"), tuple(flat(values).items()))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Cell]:
    """`{"ttft_ms": {"p95": 9}}` becomes `{"ttft_ms p95": 9}`; a list becomes a text."""
    found: dict[str, Cell] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key} ")
        else:
            found[f"{prefix}{key}"] = _cell(value)
    return found


def _in_order(flat_rows: Sequence[Mapping[str, Cell]], keys: Sequence[str]) -> list[str]:
    """By key, then as first seen: rows may differ in what they have."""
    columns = list(dict.fromkeys(column for row in flat_rows for column in row))
    rank = {key: place for place, key in enumerate(keys)}
    return sorted(columns, key=lambda column: rank.get(column.split(" ")[0], len(rank)))


def _cell(value: Any) -> Cell:
    if isinstance(value, list):
        return ", ".join(str(flat(one) if isinstance(one, Mapping) else one) for one in value)
    return value if value is None or isinstance(value, int | float) else str(value)


def _markdown_cell(cell: Cell) -> str:
    return "" if cell is None else " ".join(str(cell).replace("|", "\\|").split())


@dataclass(frozen=True)
class Part:
    """Figures and tables of one file on one topic."""

    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Topic:
    """`make` takes a file of this `benchmark`; empty means every file."""

    anchor: str
    title: str
    intro: str
    make: Callable[[ResultFile, Colours], Part]
    benchmark: str = ""


@dataclass(frozen=True)
class Block:
    """A part as it goes into the page: each figure is a title and an `<svg>` element."""

    file: ResultFile
    figures: Sequence[tuple[str, str]]
    tables: Sequence[Table]
