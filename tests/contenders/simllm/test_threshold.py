"""The threshold "auto": its bound against SciPy's, its choice against a plain search, and a manager that follows it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from kvarena.contenders.simllm.similarity import AutoThreshold, chosen_threshold, wilson_lower_bound
from kvarena.simllm import AgreementSample, AutoThresholdParams, InterTaskKVManager

DIM = 16
PARAMS = AutoThresholdParams()


def bound_of(samples: list[AgreementSample], similarity: float, params: AutoThresholdParams) -> float:
    above = [sample.agrees for sample in samples if sample.similarity >= similarity]
    return float(
        binomtest(sum(above), len(above), alternative="greater").proportion_ci(params.confidence, "wilson").low
    )


@given(num_samples=st.integers(1, 400), share=st.floats(0, 1), confidence=st.floats(0.5, 0.999))
def test_the_bound_is_wilsons(num_samples: int, share: float, confidence: float) -> None:
    params = AutoThresholdParams(confidence=confidence, max_samples=10**6)
    num_agreeing = round(share * num_samples)
    expected = binomtest(num_agreeing, num_samples, alternative="greater").proportion_ci(confidence, "wilson").low
    assert wilson_lower_bound(num_agreeing, num_samples, params.z) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95, 0.99])
def test_as_many_samples_are_needed_as_an_agreement_without_exception_takes(target: float) -> None:
    params = AutoThresholdParams(target_agreement=target)
    needed = params.num_samples_needed
    assert wilson_lower_bound(needed, needed, params.z) >= target
    assert needed == 1 or wilson_lower_bound(needed - 1, needed - 1, params.z) < target


@settings(max_examples=200)
@given(
    samples=st.lists(st.builds(AgreementSample, st.sampled_from([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]), st.booleans())),
    target=st.sampled_from([0.3, 0.6, 0.9]),
)
def test_the_lowest_similarity_whose_bound_reaches_the_target_is_chosen(
    samples: list[AgreementSample], target: float
) -> None:
    params = AutoThresholdParams(target_agreement=target, num_nearest=4)
    ordered = sorted(samples, key=lambda sample: -sample.similarity)

    def agreement_nearby(similarity: float) -> float:
        nearest = [sample.agrees for sample in ordered if sample.similarity >= similarity][-params.num_nearest :]
        return sum(nearest) / len(nearest)

    reaching = [
        sample.similarity
        for sample in samples
        if sample.agrees
        and bound_of(samples, sample.similarity, params) >= target
        and agreement_nearby(sample.similarity) >= target
    ]
    chosen = chosen_threshold(samples, params)
    if reaching:
        assert chosen == min(reaching)
    else:
        most_similar = [sample.agrees for sample in ordered[: params.num_nearest]]
        falls_short = bool(samples) and sum(most_similar) / len(most_similar) < target
        assert chosen == (math.inf if falls_short else params.initial_threshold)


def settled(agrees: Callable[[float], bool], seed: int = 0, num_requests: int = 3000) -> AutoThreshold:
    """After so many requests with random similarities, those that are drawn compared."""
    threshold, rng = AutoThreshold(AutoThresholdParams(seed=seed)), random.Random(seed)
    for _ in range(num_requests):
        similarity = rng.uniform(0.5, 1)
        if threshold.draws_check():
            threshold.record(AgreementSample(similarity, agrees(similarity)))
    return threshold


@pytest.mark.parametrize("edge", [0.6, 0.75, 0.9])
def test_it_ends_above_the_similarity_below_which_reuse_disagrees(edge: float) -> None:
    for seed in range(5):
        threshold = settled(lambda similarity: similarity >= edge, seed)
        assert edge <= threshold.value < edge + 0.03
        statistics = threshold.get_statistics()
        assert statistics["agreement"] == 1
        assert statistics["agreement_bound"] >= 0.95
        assert statistics["threshold"] == threshold.value


def test_many_that_agree_hide_no_few_that_dont() -> None:
    samples = [AgreementSample(1.0, agrees=True)] * 300 + [
        AgreementSample(0.6 + i / 1000, i % 2 == 1) for i in range(9)
    ]
    assert bound_of(samples, 0.601, PARAMS) > PARAMS.target_agreement
    assert chosen_threshold(samples, PARAMS) == 1.0
    assert chosen_threshold(samples, replace(PARAMS, num_nearest=1)) == 0.601


def test_without_evidence_it_is_high_and_every_request_is_compared() -> None:
    threshold = AutoThreshold(PARAMS)
    for _ in range(PARAMS.num_samples_needed):
        assert threshold.value == PARAMS.initial_threshold
        assert threshold.draws_check()
        threshold.record(AgreementSample(0.7, agrees=True))
    assert threshold.value == 0.7
    share = sum(threshold.draws_check() for _ in range(5000)) / 5000
    assert share == pytest.approx(PARAMS.sample_ratio, abs=0.02)


def test_where_nothing_agrees_nothing_is_reused() -> None:
    threshold = settled(lambda similarity: False)
    assert threshold.value == math.inf
    assert threshold.get_statistics()["threshold"] is None


def test_it_goes_up_again_when_agreement_is_lost() -> None:
    """The oldest of `max_samples` go."""
    params = AutoThresholdParams(max_samples=60)
    threshold = AutoThreshold(params)
    for _ in range(60):
        threshold.record(AgreementSample(0.6, agrees=True))
    assert threshold.value == 0.6
    for _ in range(60):
        threshold.record(AgreementSample(0.6, agrees=False))
        threshold.record(AgreementSample(0.8, agrees=True))
    assert threshold.value > 0.6
    assert threshold.get_statistics()["num_samples"] == 60


def test_the_same_seed_draws_the_same() -> None:
    def course(seed: int) -> list[float]:
        return [settled(lambda similarity: similarity > 0.8, seed, num_requests).value for num_requests in (60, 500)]

    assert course(1) == course(1)
    threshold = settled(lambda similarity: True, 3)
    threshold.reset()
    fresh = AutoThreshold(AutoThresholdParams(seed=3))
    for _ in range(200):
        assert threshold.draws_check() == fresh.draws_check()
        threshold.record(AgreementSample(0.9, agrees=True))
        fresh.record(AgreementSample(0.9, agrees=True))


def test_threads_lose_no_sample() -> None:
    threshold = AutoThreshold(PARAMS)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: threshold.record(AgreementSample(number / 1000, agrees=True)), range(400)))
    assert threshold.get_statistics()["num_samples"] == 400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_agreement": 1.0}, "target_agreement must be above 0 and below 1, not 1.0"),
        ({"sample_ratio": 0.0}, "sample_ratio must be above 0 and below 1, not 0.0"),
        ({"num_nearest": 0}, "num_nearest must be at least 1, not 0"),
        ({"confidence": 0.4}, "confidence must be at least 0.5 and below 1, not 0.4"),
        ({"initial_threshold": 2.0}, "initial_threshold must be a number from -1 to 1, not 2.0"),
        ({"lowest_threshold": float("nan")}, "lowest_threshold must be a number from -1 to 1, not nan"),
        ({"max_samples": 51}, "max_samples must be at least 52.*not 51"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoThresholdParams(**settings)  # type: ignore[arg-type]


def kv_of(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 1, num_tokens, 4), torch.zeros(1, 1, num_tokens, 4)


def at_similarity(similarity: float) -> torch.Tensor:
    """An embedding of that cosine with the first axis."""
    embedding = torch.zeros(DIM)
    embedding[0], embedding[1] = similarity, (1 - similarity**2) ** 0.5
    return embedding


def test_a_manager_gives_out_checks_and_reuses_above_what_was_measured() -> None:
    manager = InterTaskKVManager(DIM, similarity_threshold="auto", device="cpu")
    manager.add_task("a", at_similarity(1.0), kv_of(1))
    rng, num_hits, num_checks = random.Random(0), 0, 0
    for _ in range(2000):
        similarity = rng.uniform(0.4, 1)
        search = manager.search_or_check(at_similarity(similarity))
        assert not (search.match and search.check)
        for found in (search.match, search.check):
            assert found is None or found.similarity == pytest.approx(similarity, abs=1e-5)
        num_hits += search.match is not None
        if search.check:
            assert similarity >= 0.5, "far ones aren't compared"
            num_checks += 1
            manager.record_check(search.check.similarity, similarity >= 0.7)
        elif manager.similarity_threshold and similarity > manager.similarity_threshold + 1e-5:
            assert search.match
    statistics = manager.get_statistics()
    assert 0.7 <= statistics["similarity_threshold"] < 0.73
    assert statistics["auto_threshold"]["num_samples"] == num_checks
    assert (statistics["num_hits"], statistics["num_misses"]) == (num_hits, 2000 - num_hits)
    plain = manager.search(at_similarity(0.99))
    assert plain is not None, "a plain search compares nothing, and uses what was found out"
    manager.reset()
    assert manager.similarity_threshold == PARAMS.initial_threshold


def test_auto_on_and_off() -> None:
    manager = InterTaskKVManager(DIM, device="cpu")
    assert manager.get_statistics()["auto_threshold"] is None
    manager.set_similarity_threshold("auto")
    assert manager.similarity_threshold == PARAMS.initial_threshold
    manager.add_task("a", at_similarity(1.0), kv_of(1))
    assert manager.search_or_check(at_similarity(0.9)).check is not None
    fixed = manager.search_or_check(at_similarity(0.9), similarity_threshold=0.8)
    assert fixed.match is not None, "a request's own threshold is a number"
    manager.set_similarity_threshold(0.95)
    assert manager.search_or_check(at_similarity(0.9)).match is None
    manager.record_check(0.9, agrees=True)
    assert manager.similarity_threshold == 0.95
    with pytest.raises(ValueError, match="must be \"auto\" or a number from -1 to 1, not 'automatic'"):
        manager.set_similarity_threshold("automatic")  # type: ignore[arg-type]
