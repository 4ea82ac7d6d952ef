"""What the manager keeps, finds and refuses."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.contenders.simllm.task import LayerKVShape, TopLayerKV
from kvarena.simllm import InterTaskKVManager

DIM, NUM_HEADS, HEAD_SIZE = 24, 2, 8


def manager_of(**settings: Any) -> InterTaskKVManager:
    return InterTaskKVManager(DIM, device="cpu", **settings)


def kv_of(num_tokens: int, fill: float = 0.0) -> TopLayerKV:
    return torch.full((1, NUM_HEADS, num_tokens, HEAD_SIZE), fill), torch.full(
        (1, NUM_HEADS, num_tokens, HEAD_SIZE), -fill
    )


def direction(number: int) -> torch.Tensor:
    """Directions at right angles to each other."""
    return torch.eye(DIM)[number]


def test_the_most_similar_task_above_the_threshold_is_found() -> None:
    manager = manager_of(similarity_threshold=0.8)
    for number in range(3):
        manager.add_task(f"task {number}", direction(number), kv_of(number + 1, float(number)))
    found = manager.search_similar_task(direction(1) + 0.5 * direction(2))
    assert found is not None
    assert (found.task_id, found.num_tokens) == ("task 1", 2)
    assert torch.equal(found.top_layer_kv[1], kv_of(2, 1.0)[1])
    assert found.lsh_hash == manager._index.compute_hash(direction(1))
    match = manager.search(direction(1) + 0.5 * direction(2))
    assert match is not None
    assert match.similarity == pytest.approx(1 / 1.25**0.5)
    assert manager.search_similar_task(direction(1) + direction(2)) is None, "0.71"
    assert manager.search_similar_task(direction(5)) is None
    assert manager.search_similar_task(torch.zeros(DIM)) is None
    statistics = manager.get_statistics()
    assert [statistics[name] for name in ("num_searches", "num_hits", "num_misses")] == [5, 2, 3]
    assert statistics["hit_ratio"] == pytest.approx(0.4)


@pytest.mark.parametrize("threshold", [1, 1.0, -1.0, 0.0])
def test_a_task_is_similar_to_itself_at_any_threshold(threshold: float) -> None:
    manager = manager_of(similarity_threshold=threshold)
    for seed in range(20):
        embedding = torch.randn(DIM, generator=torch.Generator().manual_seed(seed))
        manager.add_task(str(seed), embedding, kv_of(1))
        found = manager.search_similar_task(embedding)
        assert found is not None
        assert found.task_id == str(seed)


def test_the_least_recently_used_task_goes_first() -> None:
    manager = manager_of(max_cache_size=3)
    for number in range(3):
        manager.add_task(str(number), direction(number), kv_of(1))
    assert manager.search_similar_task(direction(0)) is not None
    manager.add_task("1", direction(1), kv_of(2))
    manager.add_task("3", direction(3), kv_of(1))
    assert list(manager._entries) == ["0", "1", "3"]
    manager.add_task("4", direction(4), kv_of(1))
    assert list(manager._entries) == ["1", "3", "4"]
    assert manager.search_similar_task(direction(0)) is None
    assert manager.get_statistics()["num_evictions"] == 2
    manager.check_integrity()


def test_long_tasks_have_a_budget_together() -> None:
    """A hundred of them took what they wanted."""
    (keys, values) = kv_of(10)
    manager = manager_of(max_cache_bytes=2 * (keys.nbytes + values.nbytes))
    for number in range(3):
        manager.add_task(str(number), direction(number), kv_of(10))
    assert list(manager._entries) == ["1", "2"]
    manager.add_task("1", direction(1), kv_of(15))
    assert list(manager._entries) == ["1"]
    manager.add_task("too long", direction(3), kv_of(21))
    assert list(manager._entries) == []
    assert manager.get_statistics()["num_bytes"] == 0
    manager.check_integrity()


def test_what_was_found_outlives_its_entry() -> None:
    manager = manager_of(max_cache_size=1)
    manager.add_task("a", direction(0), kv_of(3, 5.0))
    found = manager.search_similar_task(direction(0))
    manager.add_task("b", direction(1), kv_of(3, 7.0))
    assert found is not None
    assert torch.equal(found.top_layer_kv[0], kv_of(3, 5.0)[0])


def test_what_is_kept_is_a_copy() -> None:
    manager = manager_of()
    embedding, kv = direction(0).clone(), kv_of(3, 5.0)
    manager.add_task("a", embedding, kv)
    embedding.zero_()
    kv[0].zero_()
    found = manager.search_similar_task(direction(0))
    assert found is not None
    assert torch.equal(found.top_layer_kv[0], kv_of(3, 5.0)[0])
    assert not found.top_layer_kv[0].requires_grad


def test_reset_forgets_tasks_and_counts() -> None:
    manager = manager_of()
    manager.add_task("a", direction(0), kv_of(1))
    manager.search_similar_task(direction(0))
    manager.reset()
    assert len(manager) == 0
    assert manager.search_similar_task(direction(0)) is None
    assert manager.get_statistics()["num_searches"] == 1


def test_a_text_has_one_task_id_for_each_salt() -> None:
    manager = manager_of()
    assert manager.generate_task_id("tea") == manager.generate_task_id("tea")
    assert len({manager.generate_task_id(text, salt) for text in ("", "tea", "té\ud800") for salt in ("", "a")}) == 6


@pytest.mark.parametrize("damage", ["wrong shape", "no tokens", "nan", "inf", "lost"])
def test_a_damaged_entry_is_a_miss_and_goes(damage: str) -> None:
    manager = manager_of()
    manager.add_task("bad", direction(0), kv_of(4))
    keys, values = manager._entries["bad"].top_layer_kv
    bad: Any = {
        "wrong shape": (keys, values[:, :, :3]),
        "no tokens": (keys[:, :, :0], values[:, :, :0]),
        "nan": (keys * float("nan"), values),
        "inf": (keys, values + float("inf")),
        "lost": (),
    }[damage]
    manager._entries["bad"] = replace(manager._entries["bad"], top_layer_kv=bad)
    assert manager.search_similar_task(direction(0)) is None
    statistics = manager.get_statistics()
    assert (statistics["num_damaged"], statistics["num_misses"], statistics["cache_size"]) == (1, 1, 0)
    manager.check_integrity()


def test_behind_a_damaged_entry_the_next_similar_one_is_found() -> None:
    manager = manager_of()
    manager.add_task("good", direction(0) + 0.2 * direction(1), kv_of(2))
    manager.add_task("bad", direction(0), kv_of(4))
    manager._entries["bad"].top_layer_kv[0].fill_(float("nan"))
    found = manager.search_similar_task(direction(0))
    assert found is not None
    assert found.task_id == "good"


@pytest.mark.parametrize(
    ("embedding", "kv", "message"),
    [
        (torch.zeros(DIM + 1), kv_of(1), rf"must be \({DIM},\), not \({DIM + 1},\)"),
        (torch.full((DIM,), float("nan")), kv_of(1), "finite"),
        (direction(0), (torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8)), r"\(1, 2, T, 8\).*not \(1, 4, 3, 8\)"),
        (direction(0), (torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, 8)), r"\(1, 2, T, 8\).*\(1, 2, 4, 8\)"),
        (direction(0), kv_of(0), r"T from 1"),
        (direction(0), kv_of(2, float("inf")), "finite"),
    ],
)
def test_what_cant_be_kept_is_refused_with_what_was_expected(
    embedding: torch.Tensor, kv: TopLayerKV, message: str
) -> None:
    manager = manager_of()
    manager.expect(DIM, LayerKVShape(NUM_HEADS, HEAD_SIZE))
    with pytest.raises(ValueError, match=message):
        manager.add_task("a", embedding, kv)
    assert len(manager) == 0
    manager.check_integrity()


def test_without_a_model_the_first_task_says_the_shape() -> None:
    manager = manager_of()
    one_tensor: Any = (torch.zeros(3, 4),)
    with pytest.raises(ValueError, match="two tensors"):
        manager.add_task("a", direction(0), one_tensor)
    manager.add_task("a", direction(0), kv_of(1))
    with pytest.raises(ValueError, match=r"\(1, 2, T, 8\)"):
        manager.add_task("b", direction(1), (torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_cache_size": 0}, "max_cache_size must be at least 1, not 0"),
        ({"max_cache_bytes": 0}, "max_cache_bytes must be at least 1, not 0"),
        ({"similarity_threshold": 1.5}, "from -1 to 1, not 1.5"),
        ({"similarity_threshold": float("nan")}, "from -1 to 1, not nan"),
        ({"num_hyperplanes": 0}, "from 1 to 64"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        manager_of(**settings)


def test_a_missing_device_warns_and_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.warns(RuntimeWarning, match="no cuda; using the CPU"):
        manager = InterTaskKVManager(DIM)
    assert manager.device == torch.device("cpu")
    with pytest.raises(ValueError, match="'toaster'"):
        InterTaskKVManager(DIM, device="toaster")


def test_many_threads() -> None:
    manager = manager_of(max_cache_size=8, similarity_threshold=0.9)
    start = threading.Barrier(12)

    def work(seed: int) -> tuple[int, int]:
        rng, hits, misses = random.Random(seed), 0, 0
        start.wait()
        for _ in range(150):
            number = rng.randrange(DIM)
            if rng.random() < 0.5:
                manager.add_task(str(number), direction(number), kv_of(1 + number, float(number)))
                continue
            found = manager.search_similar_task(direction(number))
            hits, misses = hits + (found is not None), misses + (found is None)
            if found is not None:
                assert found.task_id == str(number)
                assert torch.equal(found.top_layer_kv[0], kv_of(1 + number, float(number))[0])
        return hits, misses

    with ThreadPoolExecutor(12) as pool:
        counts = list(pool.map(work, range(12)))
    manager.check_integrity()
    statistics = manager.get_statistics()
    assert statistics["num_hits"] == sum(hits for hits, _ in counts) > 0
    assert statistics["num_misses"] == sum(misses for _, misses in counts) > 0
    assert statistics["cache_size"] == 8


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "search", "damage", "threshold", "reset"]), st.integers(0, 11)), max_size=60
    )
)
def test_random_operations(operations: list[tuple[str, int]]) -> None:
    """Beside a plain list of the tasks in the order of their use, damaged ones among them."""
    manager, expected, damaged = manager_of(max_cache_size=5, similarity_threshold=0.9), list[int](), set[int]()
    for operation, number in operations:
        if operation == "add":
            manager.add_task(str(number), direction(number), kv_of(1 + number, float(number)))
            expected = [*(one for one in expected if one != number), number][-5:]
            damaged.discard(number)
        elif operation == "search":
            found = manager.search_similar_task(direction(number))
            is_there = number in expected and number not in damaged
            assert (found.task_id if found else None) == (str(number) if is_there else None)
            expected = [one for one in expected if one != number] + [number] * is_there
        elif operation == "damage" and number in expected:
            manager._entries[str(number)].top_layer_kv[1].fill_(float("nan"))
            damaged.add(number)
        elif operation == "threshold":
            manager.set_similarity_threshold(0.5 + number / 100)
        elif operation == "reset" and number == 0:
            manager.reset()
            expected = []
        damaged &= set(expected)
        manager.check_integrity()
        assert list(manager._entries) == [str(one) for one in expected]
        num_bytes = sum(2 * 4 * (1 + one) * NUM_HEADS * HEAD_SIZE for one in expected)
        assert manager.get_statistics()["num_bytes"] == num_bytes
