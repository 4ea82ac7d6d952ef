"""What is drawn equals the rows: lines, whiskers, bars, colours."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from kvarena.bench.plotting import draw, draw_bars, draw_line, save_png, to_svg
from kvarena.bench.report import render
from kvarena.panels.kinds import Picture
from kvarena.panels.panel import (
    COLOURS,
    GREY,
    PALETTE,
    Axis,
    Bar,
    Panel,
    Series,
    colours_of,
    drawn_name,
    times_ms,
    variant_label,
)
from kvarena.panels.quality import by_share, by_time, lines
from kvarena.panels.speed import conditions, over_context, speedup, throughput_bars, time_bars, ttft_bars
from support.small_eval_result import small_eval_result
from support.small_ttft_result import CONTEXTS, SETUPS, small_ttft_result

ROWS = small_ttft_result()["rows"]
WARM = [row for row in ROWS if row["store"] == "warm" and row["concurrency"] == 1]
BURSTS = [row for row in ROWS if row["concurrency"] == 8]


def drawn(panel: Panel) -> Axes:
    axes: Axes = Figure().subplots()
    draw(axes, panel)
    return axes


def error_bars(axes: Axes, number: int) -> ErrorbarContainer:
    container = axes.containers[number]
    assert isinstance(container, ErrorbarContainer)
    return container


def whiskers(axes: Axes, number: int) -> list[tuple[float, float]]:
    """Low and high of every point of a line."""
    (bars,) = error_bars(axes, number).lines[2]
    return [(float(low), float(high)) for (_, low), (_, high) in bars.get_segments()]


def test_ttft_lines_equal_the_rows() -> None:
    series = over_context(WARM, times_ms)
    assert len(series) == len(SETUPS)
    for one in series:
        rows = [row for row in WARM if variant_label(row) == one.label]
        assert tuple(one.x) == CONTEXTS
        assert list(one.y) == list(one.low) == [row["ttft_ms"]["median"] for row in rows]
        assert list(one.high) == [row["ttft_ms"]["p95"] for row in rows]
        assert {drawn_name(row) for row in rows} == {one.name}


def test_speedup_lines_equal_the_rows_and_leave_plain_out() -> None:
    series = {one.label: one for one in over_context(WARM, speedup)}
    assert "plain" not in series
    ratios = [row["speedup_vs_plain"] for row in WARM if row["policy"] == "chunk_head"]
    one = series["blend chunk_head 5 %"]
    assert list(zip(one.low, one.y, one.high, strict=True)) == [(r["low"], r["median"], r["high"]) for r in ratios]


def test_a_drawn_line_has_its_points_whiskers_and_name() -> None:
    axes: Axes = Figure().subplots()
    draw_line(axes, Series("random", "the label", [1, 2], [5, 6], low=[4, 6], high=[5, 9]), GREY, "o")
    assert np.asarray(error_bars(axes, 0).lines[0].get_xydata()).tolist() == [[1, 5], [2, 6]]
    assert whiskers(axes, 0) == [(4, 5), (6, 9)]
    assert axes.get_legend_handles_labels()[1] == ["the label"]


def test_ratios_of_a_policy_share_its_colour_and_differ_in_their_dashes() -> None:
    deviation = [one for one in over_context(WARM, times_ms) if one.name == "kv_deviation"]
    axes = drawn(Panel("", Axis(""), series=deviation))
    first, second = (error_bars(axes, number).lines[0] for number in range(2))
    assert first.get_color() == second.get_color() == COLOURS["kv_deviation"]
    assert first.get_linestyle() != second.get_linestyle()


def test_every_name_has_one_colour_whatever_else_is_drawn() -> None:
    colours = colours_of(["mine", "yours", *COLOURS])
    assert len({colours[name] for name in COLOURS}) == len(COLOURS)
    assert all(colours[name] == COLOURS[name] for name in COLOURS)
    few = colours_of(["mine", "plain", "kv_deviation", "yours"])
    assert len({few[name] for name in ("mine", "plain", "kv_deviation", "yours")}) == 4


def test_colours_stand_out_on_light_and_dark_pages() -> None:
    pages = re.findall(r"--page: (#\w{6})", render([]))
    assert len(pages) == 2
    for colour, page in itertools.product((GREY, *PALETTE), pages):
        brighter, darker = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= 3, f"{colour} on {page}"


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_time_bars_are_the_stages_as_shares() -> None:
    for bar, row in zip(time_bars(WARM), WARM, strict=True):
        total_ms = sum(row["stages_ms"].values())
        shares = {name: length for name, length, _ in bar.parts}
        assert sum(shares.values()) == pytest.approx(100)
        assert shares["recompute"] == pytest.approx(100 * row["stages_ms"].get("recompute", 0) / total_ms)
        assert shares["rotate"] == pytest.approx(100 * row["stages_ms"].get("move", 0) / total_ms)
        assert bar.label == variant_label(row)
    names = [name for name, *_ in time_bars(WARM)[0].parts]
    assert names == ["fetch", "rotate", "write", "select", "recompute", "prefill", "decode", "report"]


def test_throughput_and_single_context_bars_equal_the_rows() -> None:
    for bar, row in zip(throughput_bars(BURSTS, COLOURS), BURSTS, strict=True):
        ((_, length, colour),) = bar.parts
        assert length == row["requests_per_s"]
        assert colour == COLOURS[drawn_name(row)]
        assert ("x)" in bar.note) == (row["contender"] != "plain")
    with_spread = BURSTS[0] | {"requests_per_s": {"median": 2.5, "low": 2, "high": 3}, "throughput_vs_plain": None}
    assert throughput_bars([with_spread], COLOURS)[0].parts[0][1] == 2.5
    lengths = [bar.parts[0][1] for bar in ttft_bars(BURSTS, COLOURS)]
    assert lengths == [row["ttft_ms"]["median"] for row in BURSTS]


def test_stacked_bars_begin_where_the_one_before_ends() -> None:
    axes: Axes = Figure().subplots()
    parts = [[("a", 1.0, GREY), ("b", 2.0, GREY)], [("a", 3.0, GREY), ("b", 0.0, GREY)]]
    draw_bars(axes, [Bar(str(number), own, "note") for number, own in enumerate(parts)])
    boxes = [(patch.get_x(), patch.get_width()) for container in axes.containers for patch in container]
    assert boxes == [(0, 1), (0, 3), (1, 2), (3, 0)]
    assert axes.get_legend_handles_labels()[1] == ["a", "b"]


def test_quality_lines_equal_the_rows_and_full_prefill_goes_across() -> None:
    result = small_eval_result()
    rows = [row for row in result["rows"] if row["kind"] == "all" and row["policy"] == "kv_deviation"]
    (series,) = lines(rows, "agreement", lambda row: row["recomputed_ratio"])
    assert list(series.x) == [row["recomputed_ratio"] for row in rows]
    assert list(series.y) == [100 * row["agreement"]["mean"] for row in rows]
    assert list(series.low) == [100 * row["agreement"]["low"] for row in rows]
    for metric, level in (("exact_match", 90), ("agreement", 100)):
        axes = drawn(by_share(result, metric, COLOURS)[0])
        labelled = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        assert labelled["plain"].get_ydata() == [level, level]
    axes = drawn(by_time(result, "exact_match", COLOURS)[0])
    assert "plain" in axes.get_legend_handles_labels()[1]


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"store": "warm", "concurrency": 1}, "warm store"),
        ({"store": "half", "concurrency": 8}, "half-warm store, 8 requests at once"),
        ({"store": "none", "concurrency": 1}, "no known chunk"),
        ({"store": "unknown", "prompts": "cold", "concurrency": 1}, "cold store"),
        ({"store": "unknown", "concurrency": 1}, "store not known"),
    ],
)
def test_conditions_in_words(row: dict[str, Any], shown: str) -> None:
    assert conditions(row) == shown


COST = Panel('a "b" <c>', Axis("$cost <1>"), Axis("$y$"), [Series("plain", "line", [1, 2], [1, 2], [1, 2], [1, 2])])


def test_an_svg_has_the_pages_ink_its_text_and_no_size() -> None:
    svg = to_svg(COST)
    assert svg.startswith('<svg role="img" aria-label="a &quot;b&quot; &lt;c&gt;" viewBox="0 0 ')
    assert "$cost &lt;1&gt;" in svg
    assert "currentColor" in svg
    assert "http" not in svg
    assert svg == to_svg(COST)


def test_panels_become_one_png(tmp_path: Path) -> None:
    save_png([COST] * 3, tmp_path / "x.png", Picture(6, 2))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
