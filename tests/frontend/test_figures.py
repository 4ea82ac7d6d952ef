"""What is computed from measured figures, and what is said when there is nothing to compute from."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from chat import Answer
from chat_view import MISS_REASONS, answer_html, misses_line, token_bar, token_parts
from figures import Figures, SimilarTask, of_answer, prefix_cache_note, similar_task_html, speed_line, with_report
from kvarena.client import StreamedAnswer, Token, Usage
from kvarena.engines.base import MissReason
from settings import Contender
from support.small_openai_server import REPORT, SIMLLM_REPORT


def streamed(first_s: float, last_s: float, usage: Usage) -> StreamedAnswer:
    """An answer that was asked for at 10 s."""
    return StreamedAnswer(sent_s=10.0, usage=usage, tokens=[Token("a", first_s), Token("b", last_s)])


def test_decode_speed_leaves_the_first_token_out() -> None:
    figures = of_answer(streamed(11.0, 13.0, Usage(9, 21)))
    assert (figures.first_token_ms, figures.total_ms, figures.tokens_per_s) == (1000, 3000, 10.0)


@pytest.mark.parametrize(("last_s", "num_tokens"), [(11.0, 5), (11.0001, 5), (12.0, 1), (12.0, None), (11.0, None)])
def test_decode_speed_is_unknown_without_a_time_between_tokens(last_s: float, num_tokens: int | None) -> None:
    assert of_answer(streamed(11.0, last_s, Usage(9, num_tokens))).tokens_per_s is None


@pytest.mark.parametrize(("num_tokens", "speed"), [(2, None), (3, None), (4, None), (5, 2.0)])
def test_the_decode_speed_of_a_few_tokens_says_little(num_tokens: int, speed: float | None) -> None:
    assert of_answer(streamed(11.0, 13.0, Usage(9, num_tokens))).tokens_per_s == speed


def test_usage_that_is_missing_leaves_counts_unknown() -> None:
    figures = of_answer(streamed(11.0, 12.0, Usage()))
    assert (figures.num_prompt_tokens, figures.num_reused_tokens, figures.num_computed_tokens) == (None, None, None)
    without_details = of_answer(streamed(11.0, 12.0, Usage(9, 3)))
    assert (without_details.num_prompt_tokens, without_details.num_computed_tokens) == (9, None)


def test_an_approximate_server_without_reports_isnt_called_exact() -> None:
    answer = streamed(11.0, 12.0, Usage(9, 3, 4))
    figures = of_answer(answer, approximate=True)
    assert (figures.approximate, figures.num_reused_tokens, figures.num_computed_tokens) == (True, 4, 5)
    assert (figures.num_recomputed_tokens, figures.num_prefix_tokens, figures.spans) == (None, None, ())
    assert not of_answer(answer).approximate


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


# -- the search for a similar earlier prompt ---------------------------------------------------------------------------


HIT = SimilarTask.read(SIMLLM_REPORT)


def test_a_hit_says_how_similar_and_what_was_skipped() -> None:
    html = similar_task_html(HIT)
    assert 'data-hit="true"' in html
    assert 'data-figure="similarity" data-value="0.99934">0.99934</b>, threshold 0.998' in html
    assert 'Skipped <b data-figure="num_skipped_passes" data-value="378">378</b> of 600 layer passes (63%)' in html


def test_the_earlier_prompt_is_shown_letter_for_letter() -> None:
    html = similar_task_html(HIT)
    assert "<summary>The earlier prompt, 1,234 tokens</summary>" in html
    assert "&lt;note&gt;Bruno plays the &lt;b&gt;lute&lt;/b&gt;." in html
    assert "<details>" not in similar_task_html(replace(HIT, matched_prompt=""))


def test_a_miss_names_the_threshold() -> None:
    html = similar_task_html(replace(HIT, similarity=None, num_layer_passes=600))
    assert 'data-hit="false"' in html
    assert "0.998" in html
    assert "<details>" not in html


def test_a_server_that_reuses_nothing_for_now_says_so() -> None:
    html = similar_task_html(replace(HIT, similarity=None, similarity_threshold=None, num_layer_passes=600))
    assert "No reuse: the server finds no similarity" in html


def test_a_comparison_says_what_came_of_it() -> None:
    check = {"similarity": 0.98765, "agrees": False}
    miss = {**SIMLLM_REPORT, "similarity": None, "check": check}
    html = similar_task_html(SimilarTask.read(miss))
    assert "reuse at cosine 0.98765 would have begun differently. Prefilled in full." in html
    check["agrees"] = True
    assert "would have begun as full prefill did" in similar_task_html(SimilarTask.read(miss))


def test_a_hit_that_cost_more_than_it_saved_says_so() -> None:
    html = similar_task_html(replace(HIT, num_layer_passes=660))
    assert 'data-value="-60">60</b> layer passes more than the 600' in html


def test_only_reports_of_simllm_have_it() -> None:
    assert with_report(Figures(), REPORT, "blend").task is None
    assert with_report(Figures(), SIMLLM_REPORT, "similar_task").task == HIT


def test_the_badge_says_exact_or_approximate_and_the_mode_of_a_hit() -> None:
    answer = Answer(Contender("simllm", "Sim-LLM", "http://127.0.0.1:8003"), text="A lute.", state="done")
    answer.figures = with_report(Figures(first_token_ms=9.0), SIMLLM_REPORT, "similar_task")
    assert "approximate · aligned</span>" in answer_html(answer)
    miss = {**SIMLLM_REPORT, "similarity": None, "approximate": False}
    answer.figures = with_report(Figures(first_token_ms=9.0), miss, "similar_task")
    assert '"ka-badge ka-badge-exact">exact</span>' in answer_html(answer)
    answer.figures = Figures(first_token_ms=9.0, approximate=False, policy="kv_deviation", ratio=0.1)
    assert '"ka-badge ka-badge-exact">exact</span>' in answer_html(answer), "nothing was reused, so no policy chose"


def test_a_hit_in_a_mode_that_loses_answers_says_so() -> None:
    warned = SimilarTask.read(SIMLLM_REPORT | {"warning": "mode top_layer skips <layers>"})
    assert "Beware: mode top_layer skips &lt;layers&gt;." in similar_task_html(warned)
    assert "Beware" not in similar_task_html(SimilarTask.read(SIMLLM_REPORT))
