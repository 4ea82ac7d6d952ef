"""What a pane says of the search for a similar earlier prompt."""

from __future__ import annotations

from dataclasses import replace

from chat import Answer
from figures import Figures, SimilarTask, similar_task_html, with_report
from settings import Contender
from support.small_openai_server import REPORT, SIMLLM_REPORT
from turns_view import answer_html

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
