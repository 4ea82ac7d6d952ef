"""Models that share tasks: between processes, through LMCache, and never with another model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvarena.core.store import ChunkStore
from kvarena.engines.hf import attention
from kvarena.simllm import TaskOutcome
from kvarena.stores.lmcache import KVGeometry, LMCacheStore
from kvarena.stores.memory import MemoryStore
from support.file_store import FileStore
from support.lmcache_server import LMCacheServer
from support.simllm_tasks import Tasks, prompt_of
from support.tiny_models import save_tiny_model
from support.waiting import wait_until

MODES = ["top_layer", "aligned"]
RETRY_S = 0.5


def sharing(folder: Path, mode: str, store: ChunkStore | None, file: Path) -> Tasks:
    tasks = Tasks.load(folder, mode=mode, similarity_threshold=0.95)
    if store is not None:
        tasks.simllm.share_tasks(store, file)
    return tasks


def by_another_process(folder: Path, mode: str, store: FileStore, file: Path, *prompts: str) -> list[dict[str, Any]]:
    backend, tests = Path(attention.__file__).parents[3], Path(__file__).parents[2]
    command = [sys.executable, "-m", "support.simllm_process", str(folder), mode, str(store.folder), str(file)]
    settings = {"PYTHONPATH": f"{backend}:{tests}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *prompts], env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_a_task_of_another_process_is_as_good_as_an_own(folder: Path, tmp_path: Path, mode: str) -> None:
    """Both ways: what this process adds the other reuses, and the other way about."""
    store, file = FileStore(tmp_path), tmp_path / "tasks.sqlite"
    here, alone = sharing(folder, mode, store, file), sharing(folder, mode, None, file)
    mine, theirs = prompt_of(0), prompt_of(1)
    here.ask(mine)
    alone.ask(mine, theirs)
    first, second = by_another_process(folder, mode, store, file, f"{mine} goat", theirs)
    (expected,) = alone.ask(f"{mine} goat")
    assert second["matched"] is None
    assert (first["matched"], first["num_layer_passes"]) == (
        expected.outcome.matched_task_id,
        expected.outcome.num_layer_passes,
    )
    assert tuple(first["token_ids"]) == expected.token_ids
    (answer,), (expected,) = here.ask(f"{theirs} tea"), alone.ask(f"{theirs} tea")
    assert answer.outcome.matched_task_id == expected.outcome.matched_task_id is not None
    assert answer.token_ids == expected.token_ids
    statistics = here.simllm.get_statistics()
    assert (statistics["num_shared_hits"], statistics["num_shared_lost"]) == (1, 0)


@pytest.mark.parametrize("mode", MODES)
def test_models_with_other_weights_share_nothing(folder: Path, tmp_path: Path, mode: str) -> None:
    other_folder = save_tiny_model(tmp_path / "other", seed=1)
    store, file, prompt = MemoryStore(1 << 24), tmp_path / "tasks.sqlite", prompt_of(2)
    one, other = sharing(folder, mode, store, file), sharing(other_folder, mode, store, file)
    assert one.simllm.task_format != other.simllm.task_format
    one.ask(prompt)
    (answer,) = other.ask(prompt)
    assert not answer.outcome.is_hit
    assert answer.token_ids == other.generate(prompt)
    assert other.simllm.get_statistics()["num_shared_hits"] == store.stats.hits == 0
    twin = sharing(folder, mode, store, file)
    assert twin.simllm.task_format == one.simllm.task_format
    assert twin.ask(prompt)[0].outcome.is_hit


def test_modes_share_nothing_and_resets_reach_all(folder: Path, tmp_path: Path) -> None:
    store, file, prompt = MemoryStore(1 << 24), tmp_path / "tasks.sqlite", prompt_of(3)
    top_layer, aligned, twin = (sharing(folder, mode, store, file) for mode in ("top_layer", "aligned", "aligned"))
    top_layer.ask(prompt)
    assert not aligned.ask(prompt)[0].outcome.is_hit
    aligned.simllm.reset_cache()
    assert not twin.ask(prompt)[0].outcome.is_hit
    assert aligned.ask(prompt)[0].token_ids == aligned.generate(prompt)


@pytest.mark.parametrize("damage", ["lost", "damaged", "down"])
def test_what_the_store_cant_give_is_computed(folder: Path, tmp_path: Path, damage: str) -> None:
    store, file, prompt = FileStore(tmp_path), tmp_path / "tasks.sqlite", prompt_of(4)
    sharing(folder, "aligned", store, file).ask(prompt)
    (kept,) = store.paths()
    if damage == "lost":
        kept.unlink()
    elif damage == "damaged":
        damaged = bytearray(kept.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        kept.write_bytes(damaged)
    store.is_down = damage == "down"
    other = sharing(folder, "aligned", store, file)
    (answer,) = other.ask(prompt)
    assert not answer.outcome.is_hit
    assert answer.token_ids == other.generate(prompt)


def lmcache(tasks: Tasks, server: LMCacheServer) -> LMCacheStore:
    name, kv = tasks.simllm.task_format.name, tasks.simllm.task_format.kv_shape
    geometry = KVGeometry(name, kv.num_layers, kv.num_kv_heads, kv.head_size, kv.dtype)
    return LMCacheStore(geometry, server.url, server.http_url, timeout_s=10.0, retry_s=RETRY_S)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_through_lmcache_whose_death_costs_only_speed(folder: Path, tmp_path: Path, mode: str) -> None:
    with LMCacheServer(tmp_path) as server:
        one, other, third, alone = (sharing(folder, mode, None, tmp_path) for _ in range(4))
        stores = [lmcache(tasks, server) for tasks in (one, other)]
        for tasks, store in zip((one, other), stores, strict=True):
            tasks.simllm.share_tasks(store, tmp_path / "tasks.sqlite")
        earlier = [prompt_of(seed, 30 + seed) for seed in range(10, 14)]
        one.ask(*earlier)
        alone.ask(*earlier)

        def outcome_of(tasks: Tasks, prompt: str) -> TaskOutcome:
            (answer,) = tasks.ask(prompt)
            assert answer.outcome.is_hit or answer.token_ids == tasks.generate(prompt)
            return answer.outcome

        (answer,), (expected,) = other.ask(f"{earlier[0]} goat"), alone.ask(f"{earlier[0]} goat")
        assert answer.outcome.matched_task_id == expected.outcome.matched_task_id is not None
        assert answer.token_ids == expected.token_ids
        num_listed = other.simllm.get_statistics()["num_shared_tasks"]
        server.kill()
        assert not outcome_of(other, f"{earlier[1]} goat").is_hit
        assert outcome_of(other, f"{earlier[0]} tea").is_hit, "it was fetched before"
        assert not outcome_of(other, f"{earlier[2]} lamp").is_hit
        statistics = other.simllm.get_statistics()
        assert statistics["num_store_errors"] > 0
        assert (statistics["num_shared_lost"], statistics["num_shared_tasks"]) == (0, num_listed)
        server.start()
        wait_until(lambda: stores[1]._context is not None)
        assert not outcome_of(other, f"{earlier[3]} rain").is_hit, "the server came back empty"
        assert other.simllm.get_statistics()["num_shared_lost"] == 1
        stores.append(lmcache(third, server))
        third.simllm.share_tasks(stores[-1], tmp_path / "tasks.sqlite")
        again = outcome_of(third, f"{earlier[3]} rain")
        assert again.similarity == pytest.approx(1), "but it keeps what it is given again"
        for store in stores:
            store.close()
