"""The page: which topics there are, in their order, and the template that they are put into."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from kvarena.bench.panels import to_svg
from kvarena.bench.report import others, quality, throughput, time_split, ttft
from kvarena.bench.report.files import ResultFile
from kvarena.bench.report.parts import Block, Part, Topic
from kvarena.bench.report.tables import pairs_table
from kvarena.bench.series import Styles, drawn_name

if TYPE_CHECKING:
    from jinja2 import Template

TTFT, EVAL = frozenset({"ttft"}), frozenset({"eval"})


def _settings(file: ResultFile, styles: Styles) -> Part:
    groups = {"Settings": file.settings, "Versions": file.versions, "Machine": file.machine}
    return Part(tables=[pairs_table(caption, values) for caption, values in groups.items()])


def _rest(file: ResultFile, styles: Styles) -> Part:
    return Part() if file.benchmark in TTFT | EVAL else others.make(file, styles)


TOPICS = (
    Topic(
        "ttft",
        "Time to first token",
        "From sending a request to its first token, as a client sees it. Contenders take turns, request by request, on "
        "the same prompts; ratios to plain are taken pair by pair.",
        ttft.make,
        TTFT,
    ),
    Topic(
        "quality",
        "Quality",
        "Share of right answers, of answers that are full prefill's (agreement), and of the next tokens along them "
        "(token agreement), and how far the distributions of those lie apart (KL), against the share of the chunks' "
        "tokens that is recomputed. The broken line across is full prefill.",
        quality.make,
        EVAL,
    ),
    Topic(
        "time-split",
        "Where the time goes",
        "The stages of a request: chunk KV is fetched, rotated to its place and written; tokens are selected and "
        "recomputed; the rest of the prompt is prefilled, then the answer decoded.",
        time_split.make,
        TTFT,
    ),
    Topic(
        "throughput",
        "Throughput",
        "Requests per second when several are sent at once.",
        throughput.make,
        TTFT,
    ),
    Topic("others", "Other benchmarks", "Pictures where the benchmark has some, and all rows.", _rest),
    Topic(
        "settings",
        "Settings, versions, machines",
        "What the figures of each file depend on.",
        _settings,
    ),
)


def render(files: Sequence[ResultFile]) -> str:
    """One self-contained page: no script, and nothing that is loaded from elsewhere.

    Raises `ValueError` naming a file whose rows aren't those of its benchmark.
    """
    styles = Styles(drawn_name(row) for file in files for row in file.rows if "contender" in row)
    sections = [(topic, [block for file in files if (block := _block(topic, file, styles))]) for topic in TOPICS]
    return _template().render(files=files, sections=[(topic, blocks) for topic, blocks in sections if blocks])


def _block(topic: Topic, file: ResultFile, styles: Styles) -> Block | None:
    """None where the file has nothing to the topic."""
    if topic.benchmarks and file.benchmark not in topic.benchmarks:
        return None
    try:
        part = topic.make(file, styles)
        figures = [(panel.title, to_svg(panel)) for panel in part.panels]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file.name} has other rows than the benchmark {file.benchmark} writes: {reason}") from error
    tables = [table for table in part.tables if table.rows]
    return Block(file, figures, tables) if figures or tables else None


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
    return environment.get_template("page.html.jinja")
