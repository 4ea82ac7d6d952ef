"""Tables to copy: the rows as they are in the file, nested figures in columns of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
