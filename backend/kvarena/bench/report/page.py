"""The report's page: figures and tables of each topic, the topics in their order, and the template they go into.

Of `kvarena bench ttft`: time to first token against context length with the speedup over plain, the stages of a
request, throughput with several requests at once. Of `kvarena eval`: quality against the share of recomputed
tokens. Other benchmarks have their pictures from `plots.py`, if any, and all their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from kvarena.bench.plots import ai100_panels, by_share, by_time, main_metric, prefix_panels, simllm_panels
from kvarena.bench.plotting import (
    Bar,
    Panel,
    Series,
    Styles,
    draw_bars,
    drawn_name,
    height_in,
    log_x,
    log_y,
    readable_ms,
    to_svg,
)
from kvarena.bench.report.parts import Block, Part, ResultFile, Topic, pairs_table, rows_table
from kvarena.bench.results import Row, grouped
from kvarena.bench.variants import Variant

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.axes import Axes


UNKNOWN = "unknown"
STORES = {"half": "half-warm store", "none": "no known chunk", UNKNOWN: "store not known"}


def variant_label(row: Row) -> str:
    """Such as `blend kv_deviation 15 % @2`, where 2 is the check layer."""
    return Variant.of_row(row).label


def conditions(row: Row) -> str:
    """Such as `warm store` or `warm store, 8 requests at once`.

    What is known of a server's store may be nothing; `prompts` says what it was sent, the same for all contenders.
    """
    state = row["store"] if row["store"] != UNKNOWN else row.get("prompts", UNKNOWN)
    at_once = f", {row['concurrency']} requests at once" if row["concurrency"] > 1 else ""
    return STORES.get(state, f"{state} store") + at_once


def over_context(rows: Sequence[Row], figures: Callable[[Row], tuple[float, float, float] | None]) -> list[Series]:
    """A line for each variant; `figures` are the middle and both ends of the whiskers, None where there are none."""
    found: list[Series] = []
    for label, of_setup in grouped(rows, variant_label).items():
        points = [(row["context_tokens"], *ends) for row in of_setup if (ends := figures(row))]
        if points:
            x, y, low, high = zip(*sorted(points), strict=True)
            name = drawn_name(of_setup[0])
            variant = sum(other.name == name for other in found)
            found.append(Series(name, label, x, y, low, high, variant))
    return found


VARIANT_KEYS = ("contender", "policy", "ratio", "check_layer", "max_ttft_ms", "options")
RUN_KEYS = ("context_tokens", "store", "prompts", "concurrency", "num_requests", "num_failed")


def ttft_part(file: ResultFile, styles: Styles) -> Part:
    """A pair of panels for each store and each number of requests at once; bars where there is one context only."""
    panels: list[Panel] = []
    for condition, rows in grouped((row for row in file.rows if row["ttft_ms"]), conditions).items():
        contexts = {row["context_tokens"] for row in rows}
        if len(contexts) > 1:
            panels += _over_context(rows, condition, styles)
        else:
            panels.append(_at_one_context(rows, f"at {min(contexts):,} tokens, {condition}", styles))
    but_stages = ({key: value for key, value in row.items() if key != "stages_ms"} for row in file.rows)
    return Part(panels, [rows_table("Time to first token, and what it took", but_stages)])


def ttft_bars(rows: Sequence[Row], styles: Styles) -> list[Bar]:
    return [
        Bar(variant_label(row), [("", row["ttft_ms"]["median"], styles.colour(drawn_name(row)))], _ttft_note(row))
        for row in rows
    ]


def times_ms(row: Row) -> tuple[float, float, float]:
    """The whisker goes from the median up to p95."""
    ttft = row["ttft_ms"]
    return ttft["median"], ttft["median"], ttft["p95"]


def speedup(row: Row) -> tuple[float, float, float] | None:
    ratio = row["speedup_vs_plain"] if row["contender"] != "plain" else None
    return (ratio["median"], ratio["low"], ratio["high"]) if ratio else None


def _over_context(rows: Sequence[Row], condition: str, styles: Styles) -> list[Panel]:
    times, ratios = over_context(rows, times_ms), over_context(rows, speedup)

    def draw_times(axes: Axes) -> None:
        _draw_lines(axes, times, styles)
        axes.set(ylabel="time to first token (ms)")

    def draw_ratios(axes: Axes) -> None:
        axes.axhline(1.0, color=styles.colour("plain"), linestyle="--", linewidth=1.3)
        _draw_lines(axes, ratios, styles)
        axes.set(ylabel="times sooner than plain")

    against = f"against context length, {condition}"
    panels = [Panel(f"Time to first token {against}; medians, whiskers to p95", draw_times)]
    if ratios:
        title = f"Times sooner than plain {against}; medians of pairs, whiskers from the least to the greatest"
        panels.append(Panel(title, draw_ratios))
    return panels


def _draw_lines(axes: Axes, lines: Sequence[Series], styles: Styles) -> None:
    styles.draw(axes, lines)
    log_x(axes, (x for line in lines for x in line.x))
    log_y(axes)
    axes.set(xlabel="context (tokens)")
    axes.grid(visible=True, which="major", alpha=0.3)


def _at_one_context(rows: Sequence[Row], where: str, styles: Styles) -> Panel:
    bars = ttft_bars(rows, styles)

    def draw(axes: Axes) -> None:
        draw_bars(axes, bars)
        axes.set(xlabel="time to first token (ms)")

    title = f"Time to first token {where}; medians, times sooner than plain at the end"
    return Panel(title, draw, height_in(bars))


def _ttft_note(row: Row) -> str:
    ratio, median = speedup(row), readable_ms(row["ttft_ms"]["median"])
    return f"{median} ({ratio[0]:.3g}x)" if ratio else median


def throughput_part(file: ResultFile, styles: Styles) -> Part:
    """A panel for each context, store and number of requests at once."""
    rows = [row for row in file.rows if row["concurrency"] > 1 and row.get("requests_per_s")]
    groups = grouped(rows, lambda row: (row["context_tokens"], conditions(row)))
    panels = [_throughput_panel(own, context, condition, styles) for (context, condition), own in groups.items()]
    keys = (*VARIANT_KEYS, *RUN_KEYS, "requests_per_s", "throughput_vs_plain", "peak_rss_bytes")
    return Part(panels, [rows_table("Throughput", rows, keys)])


def throughput_bars(rows: Sequence[Row], styles: Styles) -> list[Bar]:
    return [
        Bar(
            variant_label(row),
            [("", _middle(row["requests_per_s"]), styles.colour(drawn_name(row)))],
            _throughput_note(row),
        )
        for row in rows
    ]


def _throughput_panel(rows: Sequence[Row], context: int, condition: str, styles: Styles) -> Panel:
    bars = throughput_bars(rows, styles)

    def draw(axes: Axes) -> None:
        draw_bars(axes, bars)
        axes.set(xlabel="requests per second")

    return Panel(f"Throughput at {context:,} tokens, {condition}; times plain's at the end", draw, height_in(bars))


def _throughput_note(row: Row) -> str:
    rate, times = f"{_middle(row['requests_per_s']):.3g}/s", row.get("throughput_vs_plain")
    return f"{rate} ({_middle(times):.3g}x)" if times and row["contender"] != "plain" else rate


def _middle(figure: float | dict[str, float]) -> float:
    """A figure that may come with its spread."""
    return float(figure["median"] if isinstance(figure, dict) else figure)


STAGES = {
    "fetch": ("fetch", "#77AADD"),
    "prefill_chunks": ("prefill missing chunks", "#AAAA00"),
    "move": ("rotate", "#99DDFF"),
    "write": ("write", "#44BB99"),
    "select": ("select", "#EEDD88"),
    "recompute": ("recompute", "#EE8866"),
    "prefill": ("prefill", "#BBBBBB"),
    "decode": ("decode", "#FFAABB"),
}
"""In the order of a request; others follow. Light colours, so that no stage looks like a policy: Paul Tol's."""
OTHER_COLOUR = "#BBCC33"


def time_split_part(file: ResultFile, styles: Styles) -> Part:
    """A panel for each context and store."""
    timed = [row for row in file.rows if row.get("stages_ms")]
    groups = grouped(timed, lambda row: (row["context_tokens"], conditions(row)))
    panels = [_time_split_panel(rows, context, condition) for (context, condition), rows in groups.items()]
    keys = (*VARIANT_KEYS, "context_tokens", "store", "concurrency", "stages_ms")
    return Part(panels, [rows_table("Milliseconds by stage, medians", timed, keys)])


def time_bars(rows: Sequence[Row]) -> list[Bar]:
    """Shares of the whole in percent, so that bars of very different times can be compared; the whole as a note.

    Every bar has every stage of these rows, if only with nothing, so that the legend is in the order of a request.
    """
    found = dict.fromkeys(stage for row in rows for stage in row["stages_ms"])
    stages = [*(stage for stage in STAGES if stage in found), *(stage for stage in found if stage not in STAGES)]
    shown = {stage: STAGES.get(stage, (stage, OTHER_COLOUR)) for stage in stages}
    bars = []
    for row in rows:
        times_ms = [row["stages_ms"].get(stage) or 0.0 for stage in stages]
        total_ms = sum(times_ms) or 1.0
        parts = [
            (name, 100 * ms / total_ms, colour) for (name, colour), ms in zip(shown.values(), times_ms, strict=True)
        ]
        bars.append(Bar(variant_label(row), parts, readable_ms(sum(times_ms))))
    return bars


def _time_split_panel(rows: Sequence[Row], context: int, condition: str) -> Panel:
    bars = time_bars(rows)

    def draw(axes: Axes) -> None:
        draw_bars(axes, bars)
        axes.set(xlabel="share of the request's time (%)", xticks=range(0, 101, 25))

    return Panel(f"Time split at {context:,} tokens, {condition}; medians, the sum at the end", draw, height_in(bars))


COMPARISONS = ("agreement", "token_agreement", "kl_along_answer")


def quality_part(file: ResultFile, styles: Styles) -> Part:
    """Each metric that the file has for each kind of question; right answers to all of them against time too."""
    right = main_metric(file.result)
    panels = [panel for metric in (right, *COMPARISONS) for panel in by_share(file.result, metric, styles)]
    panels += by_time(file.result, right, styles)[:1]
    return Part(panels, [rows_table("Quality, closeness to full prefill, and speed", file.rows)])


PANELS: dict[str, Callable[[Mapping[str, Any]], list[Panel]]] = {
    "prefix": prefix_panels,
    "simllm": simllm_panels,
    "ai100": ai100_panels,
}


def other_part(file: ResultFile, styles: Styles) -> Part:
    """A table for each `measure`, where a benchmark has several."""
    draw = PANELS.get(file.benchmark)
    measures = grouped(file.rows, lambda row: str(row.get("measure", "")))
    tables = [rows_table(measure.capitalize() or "Rows", rows) for measure, rows in measures.items()]
    return Part(draw(file.result) if draw and file.rows else (), tables)


TTFT, EVAL = frozenset({"ttft"}), frozenset({"eval"})


def _settings(file: ResultFile, styles: Styles) -> Part:
    groups = {"Settings": file.settings, "Versions": file.versions, "Machine": file.machine}
    return Part(tables=[pairs_table(caption, values) for caption, values in groups.items()])


def _rest(file: ResultFile, styles: Styles) -> Part:
    return Part() if file.benchmark in TTFT | EVAL else other_part(file, styles)


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
