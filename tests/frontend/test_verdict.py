"""The verdict over a chat's turns: what it says is what was measured, and no more."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from chat import Context, Turn
from chat_view import speed_html
from contender_api import Sampling
from figures import Done, Figures, FirstToken, Text
from settings import Contender
from verdict import LENGTHS_OPEN, are_comparable, verdict_html, verdicts

BLEND = Contender("blend", "Blend", "http://127.0.0.1:1", approximate=True)
PLAIN = Contender("plain", "Plain", "http://127.0.0.1:2")


def turn(
    blend_ms: float,
    plain_ms: float,
    agrees: bool = True,
    num_tokens: int = 1000,
    cached: int = 0,
    temperature: float = 0,
    **of_blend: Any,
) -> Turn:
    asked = Turn.ask("Who?", Context(), (BLEND, PLAIN), Sampling(temperature))
    reports: dict[str, dict[str, Any]] = {
        "blend": {"policy": "kv_deviation", "ratio": 0.1, "approximate": True} | of_blend,
        "plain": {"num_prefix_tokens": cached, "approximate": False},
    }
    texts = {"blend": "Ann" if agrees else "Ben", "plain": "Ann"}
    for name, ms in (("blend", blend_ms), ("plain", plain_ms)):
        figures = Figures(first_token_ms=ms, num_prompt_tokens=num_tokens, **reports[name])
        for event in (FirstToken(ms), Text(texts[name]), Done(figures, "stop")):
            asked.answers[name].apply(event)
    return asked


@pytest.mark.parametrize(
    ("blend_ms", "tone", "words"),
    [
        (50, "gain", "2.0 times faster to the first token than Plain"),
        (96, "tie", "equally fast"),
        (104, "tie", "equally fast"),
        (200, "loss", "2.0 times slower to the first token than Plain"),
    ],
)
def test_a_small_gain_is_a_tie_and_one_sample_says_so(blend_ms: float, tone: str, words: str) -> None:
    (verdict,) = verdicts([turn(blend_ms, 100)])
    assert verdict.tone == tone
    assert words in verdict.speed_text()
    assert "one prompt only" in verdict.speed_text()


@pytest.mark.parametrize(
    ("blend_ms", "words"),
    [(50, "2.0 times faster"), (96, "equally fast"), (200, "2.0 times slower")],
)
def test_the_short_form_says_how_many_prompts_it_stands_on(blend_ms: float, words: str) -> None:
    (one,) = verdicts([turn(blend_ms, 100)])
    assert one.short_speed_text() == f"Blend, kv_deviation 10%: {words} (1 prompt)"
    (five,) = verdicts([turn(blend_ms, 100), turn(blend_ms, 100, cached=900)] + [turn(blend_ms, 100)] * 4)
    assert five.short_speed_text() == f"Blend, kv_deviation 10%: {words} (5 prompts)"
    assert f'<span class="ka-short">{one.short_speed_text()}</span>' in verdict_html([turn(blend_ms, 100)])
    (untimed,) = verdicts([turn(blend_ms, 100, cached=900)])
    assert untimed.short_speed_text() == "Blend, kv_deviation 10%: not timed"


def test_the_line_of_a_turn_names_no_winner_of_an_unfair_race() -> None:
    assert "times faster" in speed_html(turn(50, 100))
    unfair = speed_html(turn(100, 50, cached=900))
    assert "Not a fair race: most of this prompt was in a prefix cache" in unfair
    assert "times faster" not in unfair
    assert "Not a fresh prompt: Plain had 900 of" in unfair


def test_another_prompt_is_compared_with_nothing() -> None:
    other = turn(50, 100)
    other.answers["blend"].figures = dataclasses.replace(other.answers["blend"].figures, num_prompt_tokens=24)
    assert verdicts([other]) == []
    assert not are_comparable(other.answers["blend"], other.answers["plain"], other, [])
    same = turn(50, 100)
    assert are_comparable(same.answers["blend"], same.answers["plain"], same, [])
    apart = turn(50, 100, agrees=False)
    assert not are_comparable(same.answers["blend"], same.answers["plain"], same, [apart]), "they follow on other words"


def test_the_median_over_prompts_and_the_answers_that_differ() -> None:
    turns = [turn(50, 100), turn(10, 100, agrees=False), turn(100, 100)]
    for number, asked in enumerate(turns):
        asked.context = Context(f"system prompt {number}")
    (verdict,) = verdicts(turns)
    assert verdict.speedup == 2.0
    assert "median of 3 prompts" in verdict.speed_text()
    assert verdict.agreement_text() == "the answers differ: 2 of 3 agree"
    html = verdict_html(turns)
    assert html.index("ka-tone-gain") < html.index("ka-tone-differs")


def test_a_measurement_over_context_lengths_stands_in_place_of_the_lengths_asked() -> None:
    turns = [turn(200, 100, num_tokens=500), turn(50, 100, num_tokens=2000)]
    (by_turns,) = verdicts(turns)
    assert by_turns.notes() == ["It pays from 2,000 tokens on, of the lengths asked, 500 to 2,000 tokens."]
    (measured,) = verdicts(turns, lambda answer: f"Measured of {answer.contender.name}, {answer.figures.setting}.")
    assert measured.notes() == ["Measured of blend, kv_deviation 10%."]
    assert "Measured of blend" in verdict_html(turns, lambda answer: f"Measured of {answer.contender.name}.")


def test_a_prompt_that_the_prefix_cache_had_is_not_timed_beside_fresh_ones() -> None:
    repeated = turn(50, 20, cached=900)
    (verdict,) = verdicts([turn(50, 100), repeated])
    assert verdict.speedup == 2.0
    assert verdict.notes() == ["1 prompt not timed: most was in a prefix cache, from an earlier prompt."]
    (alone,) = verdicts([repeated])
    assert (alone.tone, alone.speedup) == ("tie", None)
    assert "no first token that could be compared" in alone.speed_text()
    assert alone.notes() == verdict.notes()


def test_a_gain_out_of_the_blends_own_prefix_cache_is_none() -> None:
    """It was asked before, and the exact contender wasn't."""
    (verdict,) = verdicts([turn(50, 100, num_prefix_tokens=900)])
    assert verdict.tone == "tie"
    assert "most was in a prefix cache" in verdict.notes()[0]


def test_a_gain_where_nothing_was_reused_is_none_and_a_loss_is_one() -> None:
    """All recomputed, or no chunk in the prompt: the other server had something else to do."""
    nothing: dict[str, Any] = {"num_reused_tokens": 0, "num_recomputed_tokens": 1000}
    (verdict,) = verdicts([turn(50, 100, **nothing)])
    assert (verdict.tone, verdict.speedup) == ("tie", None)
    assert verdict.notes() == ["1 prompt not timed: nothing was reused, so other work made the difference."]
    (loss,) = verdicts([turn(200, 100, **nothing)])
    assert (loss.tone, loss.notes()) == ("loss", [])


def test_answers_to_different_histories_are_not_compared() -> None:
    """Each contender goes on from its own earlier answers, also when such a turn is asked again."""
    turns = [turn(50, 100, agrees=False), turn(50, 100), turn(50, 100)]
    turns[2].repeats = 1
    (verdict,) = verdicts(turns)
    assert verdict.agreement_text() == "the answers differ"
    assert verdict.notes() == ["2 answers not compared: earlier answers already differed."]
    alike = [turn(50, 100), turn(50, 100, agrees=False)]
    (verdict,) = verdicts(alike)
    assert verdict.agreement_text() == "the answers differ: 1 of 2 agree"
    alike[0].shuffle()
    assert not verdicts(alike[:1]), "blind"
    elsewhere = turn(50, 100)
    elsewhere.context = Context("another system prompt")
    (verdict,) = verdicts([turns[0], elsewhere])
    assert verdict.agreement_text() == "the answers differ: 1 of 2 agree"


def test_first_tokens_after_the_time_that_was_given_are_told() -> None:
    (verdict,) = verdicts([turn(600, 900, max_ttft_ms=500), turn(400, 900, max_ttft_ms=500)])
    assert verdict.notes() == ["1 of 2 first tokens came after the time that was given."]


def test_drawn_answers_are_not_compared() -> None:
    (verdict,) = verdicts([turn(50, 100, agrees=False, temperature=0.7)])
    assert not verdict.differs
    assert verdict.agreement_text() == "answers drawn at a temperature aren't compared"


def test_white_space_is_no_difference_as_in_the_panes() -> None:
    asked = turn(50, 100)
    asked.answers["blend"].text, asked.answers["plain"].text = "Ann\n\nBell", "Ann Bell"
    (verdict,) = verdicts([asked])
    assert verdict.agreement_text() == "the answers agree"


def test_blends_in_a_time_are_one_setting_whatever_they_came_to() -> None:
    (verdict,) = verdicts([turn(50, 100, ratio=0.1234, max_ttft_ms=500), turn(40, 100, ratio=0.2, max_ttft_ms=500)])
    assert verdict.title == "Blend, kv_deviation within 500 ms"
    assert "median of 2 prompts" in verdict.speed_text()


@pytest.mark.parametrize(
    ("speedups", "told"),
    [
        ({1000: 2, 1100: 2}, ""),
        ({1000: 2, 4000: 3}, "pays at all of the lengths asked, 1,000 to 4,000"),
        ({1000: 0.8, 2000: 1.2, 4000: 3}, "pays from 2,000 tokens on, of the lengths asked, 1,000 to 4,000"),
        ({1000: 2, 2000: 1.0, 4000: 3}, "pays from 4,000 tokens on"),
        ({1000: 2, 4000: 1.0}, "doesn't pay at the longest"),
    ],
)
def test_from_what_length_it_pays(speedups: dict[int, float], told: str) -> None:
    (verdict,) = verdicts([turn(100 / factor, 100, num_tokens=length) for length, factor in speedups.items()])
    assert told in verdict.length_text()
    assert bool(told) == bool(verdict.length_text())


def test_where_to_find_out_from_what_length_it_pays_is_said_once_while_it_is_open() -> None:
    alike, other, longer = turn(50, 100), turn(25, 100, ratio=0.5), turn(50, 100, num_tokens=4000)
    assert verdict_html([alike, other]).count(LENGTHS_OPEN) == 1
    assert verdict_html([alike, other]).endswith(f"{LENGTHS_OPEN}</small></div>")
    assert LENGTHS_OPEN not in verdict_html([alike, longer]), "told by the lengths asked"
    assert LENGTHS_OPEN not in verdict_html([alike], lambda answer: "Measured."), "told by a measurement"
    assert LENGTHS_OPEN not in verdict_html([turn(50, 100, cached=900)]), "no times were compared"


def test_other_settings_are_not_mixed_in() -> None:
    found = verdicts([turn(50, 100), turn(25, 100, ratio=0.5)])
    assert [(one.title, one.speedup) for one in found] == [
        ("Blend, kv_deviation 10%", 2.0),
        ("Blend, kv_deviation 50%", 4.0),
    ]


def test_nothing_is_said_without_an_exact_contender_or_a_time() -> None:
    alone = Turn.ask("Who?", Context(), (BLEND,), Sampling())
    alone.answers["blend"].apply(FirstToken(1.0))
    assert verdict_html([alone, Turn.ask("Who?", Context(), (BLEND, PLAIN), Sampling())]) == ""


def test_a_blend_that_had_nothing_to_reuse_is_not_what_others_are_compared_with() -> None:
    asked = turn(50, 100)
    blend, plain = asked.answers.values()
    blend.figures = dataclasses.replace(blend.figures, approximate=False)
    (verdict,) = verdicts([asked])
    assert verdict.reference == "Plain"
    plain.state = "interrupted"
    assert verdicts([asked]) == []


def test_answers_under_way_are_not_compared() -> None:
    asked = Turn.ask("Who?", Context(), (BLEND, PLAIN), Sampling())
    for answer in asked.answers.values():
        answer.apply(FirstToken(5.0))
    asked.answers["plain"].apply(Done(Figures(first_token_ms=5.0, approximate=False), "stop"))
    (verdict,) = verdicts([asked])
    assert verdict.agreement_text() == "no whole answers to compare"
    assert 'data-agreement="tie"' in verdict_html([asked])
