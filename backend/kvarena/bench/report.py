"""`kvarena report`: one HTML page from result files of any benchmark. Reads files, measures nothing.

The page has a section for each topic and in it a block for each file: figures, and tables to copy with the rows as they
are in the file, nested figures in columns of their own. `bench ttft` has time to first token against context length
with the speedup over plain, the stages of a request, and throughput; `eval` has quality against the share of recomputed
tokens. Other benchmarks have their panels, if any, and all their rows.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.bench.plotting import to_svg
from kvarena.bench.results import Row, load_results
from kvarena.panels.kinds import EVAL, RESULT_KINDS, TTFT, VARIANT, result_summary
from kvarena.panels.panel import Colours, Panel, colours_in, grouped
from kvarena.panels.quality import by_share, by_time, main_metric
from kvarena.panels.speed import throughput_panels, throughput_rows, time_split_panels, ttft_panels

if TYPE_CHECKING:
    from jinja2 import Template

BESIDE_ROWS = ("settings", "versions", "machine")


@dataclass(frozen=True)
class ResultFile:
    """`name` is the path as it was given: what tells files of one benchmark apart."""

    name: str
    result: Mapping[str, Any]

    @property
    def benchmark(self) -> str:
        return str(self.part("settings").get("benchmark", ""))

    @property
    def rows(self) -> list[Row]:
        return list(self.result["rows"])

    @property
    def summary(self) -> str:
        return result_summary(self.result)

    def part(self, key: str) -> Mapping[str, Any]:
        found = self.result.get(key) or {}
        assert isinstance(found, Mapping), f"{key} of {self.name} was checked"
        return found


def read_files(given: Sequence[str]) -> list[ResultFile]:
    """Result files by path, folder or pattern, each once. Raises `ValueError` naming what is missing or no result."""
    paths = dict.fromkeys(path for one in given for path in _paths(one))
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
    for key in BESIDE_ROWS:
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


Part = tuple[Sequence[Panel], Sequence[Table]]
"""Figures and tables of one file on one topic."""


@dataclass(frozen=True)
class Topic:
    """`make` takes a file of this `benchmark`; empty means every file."""

    anchor: str
    title: str
    intro: str
    make: Callable[[ResultFile, Colours], Part]
    benchmark: str = ""


RUN_KEYS = ("context_tokens", "store", "prompts", "concurrency", "num_requests", "num_failed")


def ttft_part(file: ResultFile, colours: Colours) -> Part:
    but_stages = ({key: value for key, value in row.items() if key != "stages_ms"} for row in file.rows)
    table = rows_table("Time to first token, and what it took", but_stages)
    return ttft_panels(file.result, colours), [table]


def throughput_part(file: ResultFile, colours: Colours) -> Part:
    keys = (*VARIANT, *RUN_KEYS, "requests_per_s", "throughput_vs_plain", "peak_rss_bytes")
    table = rows_table("Throughput", throughput_rows(file.rows), keys)
    return throughput_panels(file.result, colours), [table]


def time_split_part(file: ResultFile, colours: Colours) -> Part:
    timed = [row for row in file.rows if row.get("stages_ms")]
    keys = (*VARIANT, "context_tokens", "store", "concurrency", "stages_ms")
    return time_split_panels(file.result), [rows_table("Milliseconds by stage, medians", timed, keys)]


COMPARISONS = ("agreement", "token_agreement", "kl_along_answer")


def quality_part(file: ResultFile, colours: Colours) -> Part:
    """Each metric that the file has for each kind of question; right answers to all of them against time too."""
    right = main_metric(file.result)
    panels = [panel for metric in (right, *COMPARISONS) for panel in by_share(file.result, metric, colours)]
    panels += by_time(file.result, right, colours)[:1]
    return panels, [rows_table("Quality, closeness to full prefill, and speed", file.rows)]


def other_part(file: ResultFile, colours: Colours) -> Part:
    """Of a benchmark without a topic of its own. A table for each `measure`, where it has several."""
    if file.benchmark in (TTFT, EVAL):
        return (), ()
    measures = grouped(file.rows, lambda row: str(row.get("measure", "")))
    tables = [rows_table(measure.capitalize() or "Rows", rows) for measure, rows in measures.items()]
    kind = RESULT_KINDS.get(file.benchmark)
    return kind.panels(file.result, colours) if kind and file.rows else (), tables


def settings_part(file: ResultFile, colours: Colours) -> Part:
    pairs = {key.capitalize(): tuple(flat(file.part(key)).items()) for key in BESIDE_ROWS}
    return (), [Table(caption, ("name", "value"), rows) for caption, rows in pairs.items()]


TOPICS = (
    Topic(
        "ttft",
        "Time to first token",
        "From sending a request to its first token, as a client sees it. Contenders take turns, request by request, on "
        "the same prompts; ratios to plain are taken pair by pair.",
        ttft_part,
        TTFT,
    ),
    Topic(
        "quality",
        "Quality",
        "Share of right answers, of answers that are full prefill's (agreement), and of the next tokens along them "
        "(token agreement), and how far the distributions of those lie apart (KL), against the share of the chunks' "
        "tokens that is recomputed. The broken line across is full prefill.",
        quality_part,
        EVAL,
    ),
    Topic(
        "time-split",
        "Where the time goes",
        "The stages of a request: chunk KV is fetched, rotated to its place and written; tokens are selected and "
        "recomputed; the rest of the prompt is prefilled, then the answer decoded.",
        time_split_part,
        TTFT,
    ),
    Topic("throughput", "Throughput", "Requests per second when several are sent at once.", throughput_part, TTFT),
    Topic("others", "Other benchmarks", "Pictures where the benchmark has some, and all rows.", other_part),
    Topic("settings", "Settings, versions, machines", "What the figures of each file depend on.", settings_part),
)


def render(files: Sequence[ResultFile]) -> str:
    """One self-contained page: no script, and nothing that is loaded from elsewhere.

    Raises `ValueError` naming a file whose rows aren't those of its benchmark.
    """
    colours = colours_in(file.result for file in files)
    sections = [(topic, [block for file in files if (block := _block(topic, file, colours))]) for topic in TOPICS]
    return _template().render(files=files, sections=[(topic, blocks) for topic, blocks in sections if blocks])


def _block(topic: Topic, file: ResultFile, colours: Colours) -> dict[str, Any] | None:
    """A part as it goes into the page, each figure a title and an `<svg>` element; None where there is nothing."""
    if topic.benchmark and file.benchmark != topic.benchmark:
        return None
    try:
        panels, tables = topic.make(file, colours)
        figures = [(panel.title, to_svg(panel)) for panel in panels]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file.name} has other rows than the benchmark {file.benchmark} writes: {reason}") from error
    tables = [table for table in tables if table.rows]
    return {"file": file, "figures": figures, "tables": tables} if figures or tables else None


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__ or "", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")
