"""Scores, intervals, variants and rows, against values computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarena.bench.measure import Reuse
from kvarena.bench.quality.asking import (
    Attempt,
    Closeness,
    GreedyAnswer,
    KLMethod,
    TokenLogprobs,
    closeness,
    full_kl,
    top_kl,
)
from kvarena.bench.quality.questions import QuestionSet, load_questions
from kvarena.bench.quality.scoring import (
    ScoreSheet,
    agrees,
    contains_answer,
    is_same_answer,
    squad_score,
)
from kvarena.bench.results import mean_interval
from kvarena.bench.variants import Variant, blend_variants, find_reference
from support.question_folder import write_question_folder

PLAIN = Variant("plain")
NAIVE = Variant("blend", "kv_deviation", 0.0)
METHOD: KLMethod = "teacher_forced"


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        ("The lute.", ["lute"], 1, 1),
        ("  LUTE ", ["harp", "a lute"], 1, 1),
        ("the old lute", ["lute"], 0, 2 / 3),
        ("lute harp", ["harp drum", "x"], 0, 1 / 2),
        ("drum", ["lute"], 0, 0),
    ],
)
def test_squad_scores(text: str, answers: list[str], exact: float, f1: float) -> None:
    score = squad_score(text, answers)
    assert score.exact_match == exact
    assert score.f1 == pytest.approx(f1)


WORDS = st.lists(st.sampled_from(["the", "A", "lute", "Lute.", "harp", "an-", "O'Neill", "É", "", " ", "#", "1,000"]))
TEXTS = WORDS.map(" ".join) | st.text(max_size=20)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_squad_scores_are_torchmetrics(text: str, answers: list[str]) -> None:
    from torchmetrics.functional.text import squad

    gold = {"answers": {"text": answers, "answer_start": [0] * len(answers)}, "id": ""}
    theirs = squad([{"prediction_text": text, "id": ""}], [gold])
    ours = squad_score(text, answers)
    assert ours.exact_match == float(theirs["exact_match"]) / 100
    assert ours.f1 == pytest.approx(float(theirs["f1"]) / 100, abs=1e-6)


def test_same_answer_goes_by_the_same_normalisation() -> None:
    assert is_same_answer("The lute", "lute.") == 1
    assert is_same_answer("lute", "harp") == 0


@pytest.mark.parametrize(
    ("text", "answers", "is_right"),
    [
        ("Virat Kohli's highest score is 254 not out.", ["254"], True),
        ("It was the year 1923.", ["1932", "1923"], True),
        ("254*", ["254"], True),
        ("254.5 runs", ["254"], False),
        ("2540 runs", ["254"], False),
        ("about 1,000 runs", ["1000"], True),
        ("She is J.K. Rowling", ["J. K. Rowling"], True),
        ("kohli’s bat", ["Kohli"], True),
        ("Harbour Street 9", ["the harbour street"], True),
        ("harbours", ["harbour"], False),
        ("new\nDelhi, India", ["New Delhi"], True),
        ("twenty-five", ["twenty five"], True),
        ("The notes do not say who it was.", ["The notes do not say."], True),
        ("hepatitis A", ["A"], False),
        ("A", ["A"], True),
        ("anything", ["..."], False),
        ("", ["tea"], False),
    ],
)
def test_a_right_answer_contains_a_gold_one_as_whole_words(text: str, answers: list[str], is_right: bool) -> None:
    assert contains_answer(text, answers) == is_right


def test_answers_agree_as_far_as_the_shorter_one_goes_where_it_is_cut() -> None:
    assert agrees("The lute.", True, "lute", True) == 1
    assert agrees("the old lu", False, "The old lute was", False) == 1
    assert agrees("the old lute", True, "The old lute was", False) == 0, "it ended there"
    assert agrees("the old harp", False, "The old lute was", False) == 0
    assert agrees("", True, "lute", True) == agrees("", False, "lute", False) == 0
    assert agrees("", True, "", True) == 1


def test_kl_over_the_whole_vocabulary() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 5, 40).log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(full_kl(p, q), expected)
    assert full_kl(p, p).max() == 0
    found = closeness(*(GreedyAnswer("", True, 1.0, forced_logprobs=x) for x in (p, q)))
    assert found
    assert (found.method, found.num_tokens) == ("teacher_forced", 5)
    assert found.kl == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.first_kl == pytest.approx(float(expected[0]), rel=1e-5)
    assert found.token_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


def test_servers_are_compared_along_the_common_prefix() -> None:
    def answered(*tokens: str, p: float = 0.5) -> GreedyAnswer:
        top = {"a": math.log(p), "b": math.log(1 - p)}
        return GreedyAnswer("", True, 1.0, logprobs=[TokenLogprobs(token, top) for token in tokens])

    found = closeness(answered("x", "y", "z", "end"), answered("x", "y", "w", "v", p=0.8))
    kl = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert found is not None
    assert (found.kl, found.first_kl) == pytest.approx((kl, kl))
    assert found == Closeness(found.kl, found.first_kl, 0.5, 3, "common_prefix_top20")
    assert closeness(answered("x"), answered("x", "y")) == Closeness(0, 0, 1, 1, "common_prefix_top20")
    assert closeness(answered("x"), GreedyAnswer("x", True, 1.0)) is None


def test_kl_is_that_of_the_distributions_when_all_tokens_are_listed() -> None:
    p, q = [0.7, 0.2, 0.1], [0.5, 0.25, 0.25]
    listed = [dict(zip("abc", map(math.log, values), strict=True)) for values in (p, q)]
    assert top_kl(*listed) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-6)
    assert top_kl(listed[0], listed[0]) == pytest.approx(0, abs=1e-6)


def test_kl_of_listed_tokens_is_a_lower_bound() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, q = rng.dirichlet(np.ones(40)), rng.dirichlet(np.ones(40))
        full = float((p * np.log(p / q)).sum())
        tops = [{str(i): math.log(d[i]) for i in np.argsort(d)[-20:]} for d in (p, q)]
        assert 0 <= top_kl(*tops) <= full + 1e-6
    assert top_kl({"a": -0.01}, {"b": -0.01}) == 0  # nothing in common says nothing


def test_intervals() -> None:
    assert mean_interval([]) is None
    assert mean_interval([1.0, 1.0]) == {"mean": 1.0, "low": 1.0, "high": 1.0}
    none, every = mean_interval([0.0] * 3, is_share=True), mean_interval([1.0] * 3, is_share=True)
    assert none == {"mean": 0.0, "low": 0.0, "high": pytest.approx(0.5615, abs=1e-3)}, "Wilson's of 0 in 3"
    assert every == {"mean": 1.0, "low": pytest.approx(0.4385, abs=1e-3), "high": 1.0}
    values = [1.0] * 60 + [0.0] * 40
    found = mean_interval(values)
    assert found
    assert found["mean"] == pytest.approx(0.6)
    assert found["low"] == pytest.approx(0.6 - 1.96 * 0.049, abs=0.02)
    assert found["high"] == pytest.approx(0.6 + 1.96 * 0.049, abs=0.02)
    assert found == mean_interval(values)


def test_setups_and_their_reference() -> None:
    variants = blend_variants("blend", ["kv_deviation", "random", "none"], [0.0, 0.15], [1, 2])
    assert [variant.label for variant in variants] == [
        "blend kv_deviation 0 % @1",
        "blend kv_deviation 0 % @2",
        "blend kv_deviation 15 % @1",
        "blend kv_deviation 15 % @2",
        "blend random 0 %",
        "blend random 15 %",
        "blend none",
    ]
    assert variants[2].choices == {"policy": "kv_deviation", "ratio": 0.15, "check_layer": 1}
    assert find_reference(variants) is None
    values, heads = blend_variants("blend", ["kv_deviation,deviation=values", "chunk_head,head_tokens=12"], [0.1], [])
    assert values.label == "blend kv_deviation (deviation values) 10 %"
    assert heads.choices == {"policy": "chunk_head", "head_tokens": 12}
    assert all(
        Variant.of_row(json.loads(json.dumps(variant.to_json()))) == variant for variant in [*variants, values, heads]
    )
    whole = blend_variants("blend", ["kv_deviation"], [0.5, 1.0], [])
    assert find_reference(whole) == whole[1]
    assert find_reference([*whole, PLAIN]) == PLAIN
    assert [variant.work == variant for variant in [*whole, PLAIN]] == [True, False, True]
    assert variants[0].work == variants[1].work == variants[4].work == variants[6].work != whole[1].work
    assert find_reference([Variant("blend", "all")]) == Variant("blend", "all")


@pytest.mark.parametrize(
    ("policy", "ratio"),
    [
        ("best", 0.1),
        ("random", 1.5),
        ("random", -0.1),
        ("kv_deviation,deviation=hidden", 0.1),
        ("chunk_head,head_tokens=x", 0.1),
        ("chunk_head,deviation=keys", 0.1),
    ],
)
def test_what_cannot_be_chosen_is_said(policy: str, ratio: float) -> None:
    with pytest.raises(ValueError, match=r"must be|has no option"):
        blend_variants("blend", [policy], [ratio], [])


@pytest.fixture
def question_set(tmp_path: Path) -> QuestionSet:
    kinds = ("single", "single", "across")
    records = [{"question": f"{kind}?", "answers": ["tea"], "kind": kind} for kind in kinds]
    return load_questions(write_question_folder(tmp_path, records))


def answer(text: str, *, is_complete: bool = True, reuse: Reuse | None = None) -> GreedyAnswer:
    return GreedyAnswer(text, is_complete, 100.0, reuse)


def test_rows_count_what_failed_and_score_the_rest(question_set: QuestionSet) -> None:
    attempts = [
        Attempt(PLAIN, 0, answer("tea")),
        Attempt(PLAIN, 1, answer("tea")),
        Attempt(PLAIN, 2, answer("Tea.")),
        Attempt(NAIVE, 0, answer("tea", reuse=Reuse(100, 60, 20)), closeness=Closeness(0.0, 0.0, 1.0, 4, METHOD)),
        Attempt(NAIVE, 1, None, "time-out"),
        Attempt(NAIVE, 2, answer("rain", reuse=Reuse(100, 80, 0, 40)), closeness=Closeness(0.3, 0.7, 0.5, 4, METHOD)),
    ]
    every = ScoreSheet(question_set, attempts, PLAIN).rows()
    rows = {(row["contender"], row["kind"]): row for row in every if row["subset"] == "all"}
    assert len(every) == 2 * len(rows), "full prefill answered all of them"
    assert list(rows) == [(name, kind) for name in ("plain", "blend") for kind in ("all", "single", "across")]
    plain, naive = rows["plain", "all"], rows["blend", "all"]
    assert plain["exact_match"]["mean"] == 1
    assert plain["agreement"] is plain["first_token_kl"] is plain["exact_match_vs_reference"] is None
    assert plain["reused_ratio"] is plain["recomputed_ratio"] is None
    assert (naive["num_questions"], naive["num_failed"], naive["num_cut"]) == (3, 1, 0)
    assert naive["exact_match"]["mean"] == naive["agreement"]["mean"] == 0.5
    assert naive["exact_match_vs_reference"]["mean"] == -0.5
    assert naive["reused_ratio"] == pytest.approx(140 / 200)
    assert naive["recomputed_ratio"] == pytest.approx(20 / 120, abs=1e-4)
    assert rows["blend", "single"]["exact_match"]["mean"] == 1
    assert rows["blend", "across"]["exact_match"]["mean"] == 0
    assert naive["token_agreement"]["mean"] == 0.75
    assert naive["kl_along_answer"]["mean"] == pytest.approx(0.15)
    assert naive["first_token_kl"]["mean"] == pytest.approx(0.35)
    assert naive["kl_method"] == METHOD
    assert plain["token_agreement"] is plain["kl_method"] is None


def test_every_figure_twice(question_set: QuestionSet) -> None:
    attempts = [Attempt(PLAIN, number, answer(text)) for number, text in enumerate(("some tea", "rain", "rain"))]
    attempts += [Attempt(NAIVE, number, answer(text)) for number, text in enumerate(("rain", "tea", "rain"))]
    rows = {
        (row["contender"], row["kind"], row["subset"]): row for row in ScoreSheet(question_set, attempts, PLAIN).rows()
    }
    assert rows["plain", "all", "all"]["correct"]["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert rows["plain", "all", "all"]["exact_match"]["mean"] == 0
    assert rows["plain", "all", "answered"]["correct"]["mean"] == 1
    assert rows["blend", "all", "all"]["correct"]["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert rows["blend", "all", "answered"]["correct"]["mean"] == 0
    assert rows["blend", "all", "answered"]["correct_vs_reference"]["mean"] == -1
    assert rows["blend", "single", "answered"]["num_questions"] == 1
    assert ("blend", "across", "answered") not in rows
    assert {row["subset"] for row in ScoreSheet(question_set, attempts, None).rows()} == {"all"}


def test_a_cut_answer_is_scored_as_far_as_it_goes(question_set: QuestionSet) -> None:
    attempts = [Attempt(PLAIN, 0, answer("tea and so on", is_complete=False)), Attempt(PLAIN, 1, answer("  "))]
    sheet = ScoreSheet(question_set, attempts, PLAIN)
    row = sheet.rows()[0]
    assert (row["num_cut"], row["correct"]["mean"], row["exact_match"]["mean"]) == (1, 0.5, 0)
    assert row["ttft_ms"]["median"] == 100
    assert [(one["outcome"], one["is_complete"]) for one in sheet.answers()] == [
        ("answered", False),
        ("answered", True),
    ]
