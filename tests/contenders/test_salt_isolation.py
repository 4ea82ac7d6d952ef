"""Another salt learns nothing of what a server keeps: the test of time itself, and the contenders of ours over HTTP."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvarena.engines.base import Engine
from support import command_lines
from support.ai100_engine import make_ai100
from support.prefix_engine import make_prefix
from support.real_server import serving
from support.salt_isolation import MAX_EFFECT, ask_over, assert_isolated, leak_in_times
from support.simllm_engine import served
from support.tiny_models import random_text, save_tiny_model

NUM_ROUNDS = 24


def times(seed: int, speedup: float) -> tuple[list[float], list[float]]:
    """Of strangers and of cold prompts, on a machine whose load swings by a factor of ten."""
    rng = np.random.default_rng(seed)
    load = rng.uniform(1, 10, NUM_ROUNDS)
    strangers, cold = (load * rng.lognormal(0, 0.2, NUM_ROUNDS) for _ in range(2))
    return list(strangers / speedup), list(cold)


def test_the_test_finds_a_leak_and_nothing_where_there_is_none() -> None:
    without = [leak_in_times(*times(seed, 1.0)) for seed in range(12)]
    assert not any(leak.is_sure for leak in without)
    assert 3 <= sum(leak.p_value < 0.5 for leak in without) <= 9, "p is uniform without a leak"
    twice = [leak_in_times(*times(seed, 2.0)) for seed in range(4)]
    assert all(leak.is_sure for leak in twice)
    assert all(abs(leak.effect - 0.5) < 0.15 for leak in twice)
    slower = leak_in_times(*times(0, 0.5))
    assert slower.p_value > 0.99
    assert slower.effect < 0 < MAX_EFFECT


ENGINES: dict[str, tuple[Callable[[Path], Engine], int]] = {
    "prefix": (lambda folder: make_prefix(folder).engine, 600),
    "simllm": (lambda folder: served(folder, "aligned").engine, 600),
    "simllm-top-layer": (lambda folder: served(folder, "top_layer").engine, 600),
    "ai100": (lambda folder: make_ai100(folder).engine, 150),
}


KEEP_NOTHING: frozenset[str] = frozenset()
"""Servers of ours that reuse nothing, and so have nothing to learn of."""


def test_no_server_of_ours_is_left_out() -> None:
    """One that reuses something stands in `ENGINES`, any other in `KEEP_NOTHING`."""
    named = {name.partition("-")[0] for name in ENGINES}
    assert named | KEEP_NOTHING == {spec.name for spec in command_lines.ENGINES}, "name it in this file"


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_a_strangers_prompt_is_as_cold_as_a_new_one(name: str, tmp_path: Path) -> None:
    """24 rounds; a false alarm comes in one of 10,000 runs at most."""
    make, num_words = ENGINES[name]
    with serving(make(save_tiny_model(tmp_path / "llama"))) as server, server.client() as http:
        ask = ask_over(http, http.get("/v1/models").json()["data"][0]["id"])
        assert_isolated(ask, lambda number: random_text(random.Random(number), num_words), num_rounds=NUM_ROUNDS)
