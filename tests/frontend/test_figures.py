"""What is computed from measured figures, and what is said when there is nothing to compute from."""

from __future__ import annotations

from typing import get_args

import pytest

from figures import Figures, Stopwatch, from_usage, prefix_cache_note, speed_line, with_report
from kvarena.client import Usage
from kvarena.engines.base import MissReason
from support.small_openai_server import REPORT
from turns_view import MISS_REASONS, misses_line, token_bar, token_parts


def test_decode_speed_leaves_the_first_token_out() -> None:
    watch = Stopwatch(sent_s=10.0, first_token_s=11.0, last_token_s=13.0)
    assert watch.first_token_ms == 1000
    assert watch.total_ms == 3000
    assert watch.tokens_per_s(21) == 10.0


@pytest.mark.parametrize(("last_s", "num_tokens"), [(11.0, 5), (11.0001, 5), (12.0, 1), (12.0, None), (None, 5)])
def test_decode_speed_is_unknown_without_a_time_between_tokens(last_s: float | None, num_tokens: int | None) -> None:
    assert Stopwatch(10.0, 11.0, last_s).tokens_per_s(num_tokens) is None


@pytest.mark.parametrize(("num_tokens", "speed"), [(2, None), (3, None), (4, None), (5, 2.0)])
def test_the_decode_speed_of_a_few_tokens_says_little(num_tokens: int, speed: float | None) -> None:
    assert Stopwatch(10.0, 11.0, 13.0).tokens_per_s(num_tokens) == speed


def test_usage_that_is_missing_leaves_counts_unknown() -> None:
    figures = from_usage(Stopwatch(0.0, 1.0, 2.0), Usage())
    assert (figures.num_prompt_tokens, figures.num_reused_tokens, figures.num_computed_tokens) == (None, None, None)
    without_details = from_usage(Stopwatch(0.0, 1.0, 2.0), Usage(9, 3))
    assert (without_details.num_prompt_tokens, without_details.num_computed_tokens) == (9, None)


def test_an_approximate_server_without_reports_isnt_called_exact() -> None:
    usage = Usage(9, 3, 4)
    figures = from_usage(Stopwatch(0.0, 1.0, 2.0), usage, approximate=True)
    assert (figures.approximate, figures.num_reused_tokens, figures.num_computed_tokens) == (True, 4, 5)
    assert (figures.num_recomputed_tokens, figures.num_prefix_tokens, figures.spans) == (None, None, ())
    assert not from_usage(Stopwatch(0.0, 1.0, 2.0), usage).approximate


def test_parts_of_the_bar_add_up_to_the_prompt() -> None:
    parts = {part.kind: part.num_tokens for part in token_parts(with_report(Figures(), REPORT))}
    assert parts == {"prefix": 5, "reused": 65, "recomputed": 20, "computed": 10}
    assert sum(parts.values()) == REPORT["num_prompt_tokens"]


def test_why_chunks_were_not_reused_is_said_in_a_line() -> None:
    misses = {"never_seen": 3, "too_short": 1, "<new>": 1}
    line = misses_line(with_report(Figures(), REPORT | {"misses_by_reason": misses}))
    assert "Chunks not reused: 3 never seen before, 1 too short, 1 &lt;new&gt;</div>" in line
    assert misses_line(with_report(Figures(), REPORT)) == ""
    assert set(MISS_REASONS) == set(get_args(MissReason))


@pytest.mark.parametrize(("by_reason", "told"), [({"never_seen": 1}, ""), ({"never_seen": 3, "evicted": 1}, "2 never")])
def test_the_system_prompt_is_no_chunk_that_was_not_reused(by_reason: dict[str, int], told: str) -> None:
    misses = [{"start": 0, "end": 40, "reason": "never_seen"}, {"start": 60, "end": 90, "reason": "never_seen"}]
    report = REPORT | {"misses_by_reason": by_reason, "misses": misses[: sum(by_reason.values())]}
    line = misses_line(with_report(Figures(), report))
    assert "System prompt not reused: never seen before</div>" in line
    assert ("Chunks not reused" in line) == bool(told)
    assert told in line
    begun = [{"start": 16, "end": 40, "reason": "never_seen"}]
    line = misses_line(with_report(Figures(), REPORT | {"misses_by_reason": {"never_seen": 1}, "misses": begun}))
    assert "Chunks not reused: 1 never seen before</div>" in line


def test_no_bar_for_unknown_counts() -> None:
    assert token_bar(Figures(num_prompt_tokens=7)) == ""


@pytest.mark.parametrize(
    ("times", "line"),
    [
        ([("A", 10.0), ("B", 45.0)], "A: 4.5 times faster than B to the first token"),
        ([("A", 45.0), ("B", 30.0)], "B: 1.50 times faster than A to the first token"),
        ([("A", 10.0), ("B", 10.2)], "A and B are equally fast to the first token"),
        ([("A", 10.0), ("B", 10.2), ("C", 10.1)], "A, C and B are equally fast to the first token"),
        ([("A", 10.0)], ""),
        ([], ""),
        (
            [("A", 30.0), ("B", 10.0), ("C", 20.0)],
            "B: 2.0 times faster than C and 3.0 times faster than A to the first token",
        ),
    ],
)
def test_speed_line_names_whoever_was_faster(times: list[tuple[str, float]], line: str) -> None:
    assert speed_line(times) == line


def test_prefix_cache_is_mentioned_for_either_side() -> None:
    cold = Figures(num_prompt_tokens=100, num_prefix_tokens=0)
    warm = Figures(num_prompt_tokens=100, num_prefix_tokens=96)
    assert prefix_cache_note([("A", cold), ("B", cold)]) == ""
    assert prefix_cache_note([("A", cold), ("B", warm)]) == (
        "Not a fresh prompt: B had 96 of 100 prompt tokens in its prefix cache."
    )
