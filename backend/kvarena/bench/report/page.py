"""The report's page: figures and tables of each topic, the topics in their order, and the template they go into.

Of `kvarena bench ttft`: time to first token against context length with the speedup over plain, the stages of a
request, throughput with several requests at once. Of `kvarena eval`: quality against the share of recomputed
tokens. Other benchmarks have their panels, if any, and all their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from kvarena.bench.plotting import to_svg
from kvarena.bench.report.parts import Block, Part, ResultFile, Topic, pairs_table, rows_table
from kvarena.panels.kinds import EVAL, RESULT_KINDS, TTFT
from kvarena.panels.panel import Colours, colours_in, grouped
from kvarena.panels.quality import by_share, by_time, main_metric
from kvarena.panels.speed import throughput_panels, throughput_rows, time_split_panels, ttft_panels

if TYPE_CHECKING:
    from jinja2 import Template


VARIANT_KEYS = ("contender", "policy", "ratio", "check_layer", "max_ttft_ms", "sink_tokens", "options")
RUN_KEYS = ("context_tokens", "store", "prompts", "concurrency", "num_requests", "num_failed")


def ttft_part(file: ResultFile, colours: Colours) -> Part:
    but_stages = ({key: value for key, value in row.items() if key != "stages_ms"} for row in file.rows)
    table = rows_table("Time to first token, and what it took", but_stages)
    return Part(ttft_panels(file.result, colours), [table])


def throughput_part(file: ResultFile, colours: Colours) -> Part:
    keys = (*VARIANT_KEYS, *RUN_KEYS, "requests_per_s", "throughput_vs_plain", "peak_rss_bytes")
    table = rows_table("Throughput", throughput_rows(file.rows), keys)
    return Part(throughput_panels(file.result, colours), [table])


def time_split_part(file: ResultFile, colours: Colours) -> Part:
    timed = [row for row in file.rows if row.get("stages_ms")]
    keys = (*VARIANT_KEYS, "context_tokens", "store", "concurrency", "stages_ms")
    return Part(time_split_panels(file.result), [rows_table("Milliseconds by stage, medians", timed, keys)])


COMPARISONS = ("agreement", "token_agreement", "kl_along_answer")


def quality_part(file: ResultFile, colours: Colours) -> Part:
    """Each metric that the file has for each kind of question; right answers to all of them against time too."""
    right = main_metric(file.result)
    panels = [panel for metric in (right, *COMPARISONS) for panel in by_share(file.result, metric, colours)]
    panels += by_time(file.result, right, colours)[:1]
    return Part(panels, [rows_table("Quality, closeness to full prefill, and speed", file.rows)])


def other_part(file: ResultFile, colours: Colours) -> Part:
    """A table for each `measure`, where a benchmark has several."""
    measures = grouped(file.rows, lambda row: str(row.get("measure", "")))
    tables = [rows_table(measure.capitalize() or "Rows", rows) for measure, rows in measures.items()]
    kind = RESULT_KINDS.get(file.benchmark)
    return Part(kind.panels(file.result, colours) if kind and file.rows else (), tables)


def _settings(file: ResultFile, colours: Colours) -> Part:
    groups = {"Settings": file.settings, "Versions": file.versions, "Machine": file.machine}
    return Part(tables=[pairs_table(caption, values) for caption, values in groups.items()])


def _rest(file: ResultFile, colours: Colours) -> Part:
    with_topics = {topic.benchmark for topic in TOPICS if topic.benchmark}
    return Part() if file.benchmark in with_topics else other_part(file, colours)


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
    Topic(
        "throughput",
        "Throughput",
        "Requests per second when several are sent at once.",
        throughput_part,
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
    colours = colours_in(file.result for file in files)
    sections = [(topic, [block for file in files if (block := _block(topic, file, colours))]) for topic in TOPICS]
    return _template().render(files=files, sections=[(topic, blocks) for topic, blocks in sections if blocks])


def _block(topic: Topic, file: ResultFile, colours: Colours) -> Block | None:
    """None where the file has nothing to the topic."""
    if topic.benchmark and file.benchmark != topic.benchmark:
        return None
    try:
        part = topic.make(file, colours)
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
