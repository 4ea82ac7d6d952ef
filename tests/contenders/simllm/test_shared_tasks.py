"""Tasks shared by managers: what one adds the others find, and what can't be had is a miss."""

from __future__ import annotations

import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvarena.contenders.simllm.task import KnownTask, TopLayerKV, WholeKV
from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.store import ChunkStore
from kvarena.engines.hf.sequence_kv import KVShape
from kvarena.simllm import InterTaskKVManager, SharedTasks, TaskFormat
from kvarena.stores import sqlite
from kvarena.stores.memory import MemoryStore
from support.file_store import FileStore

DIM, NUM_HEADS, HEAD_SIZE = 24, 2, 8
SHAPE = KVShape(1, NUM_HEADS, HEAD_SIZE, torch.float32, torch.device("cpu"))
FORMAT = TaskFormat("llama-1", "top_layer", DIM, SHAPE)
ALIGNED = TaskFormat("llama-1", "aligned", DIM, replace(SHAPE, num_layers=3))


def manager_of(
    store: ChunkStore, path: Path, task_format: TaskFormat = FORMAT, max_tasks: int = 100, **settings: Any
) -> InterTaskKVManager:
    manager = InterTaskKVManager(DIM, device="cpu", **settings)
    manager.share(SharedTasks(store, path, task_format, max_tasks))
    return manager


def kv_of(num_tokens: int, seed: int) -> TopLayerKV:
    keys, values = torch.randn(2, 1, NUM_HEADS, num_tokens, HEAD_SIZE, generator=torch.Generator().manual_seed(seed))
    return keys, values


def whole_of(num_tokens: int, seed: int) -> tuple[TopLayerKV, WholeKV]:
    """KV of three layers, and the last one of it once more."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(2, 3, num_tokens, NUM_HEADS * HEAD_SIZE, generator=generator)
    keys, values = kv[:, 2].view(2, 1, num_tokens, NUM_HEADS, HEAD_SIZE).transpose(2, 3)
    return (keys, values), WholeKV(Chunk(as_token_ids(range(seed, seed + num_tokens))), kv)


def direction(number: int) -> torch.Tensor:
    return torch.eye(DIM)[number]


def found_by(manager: InterTaskKVManager, number: int) -> str | None:
    found = manager.search_similar_task(direction(number))
    manager.check_integrity()
    return found.task_id if found else None


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    (tmp_path / "kv").mkdir()
    return FileStore(tmp_path / "kv")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tasks.sqlite"


def test_what_one_adds_another_finds_as_it_was(path: Path) -> None:
    memory = MemoryStore(1 << 20)
    one, other = manager_of(memory, path), manager_of(memory, path)
    for number in range(3):
        one.add_task(f"task {number}", direction(number), kv_of(number + 1, number), salt=f"salt {number}")
    match = other.search(direction(1) + 0.2 * direction(2))
    assert match is not None
    entry = match.entry
    assert (entry.task_id, entry.salt, entry.num_tokens) == ("task 1", "salt 1", 2)
    assert match.similarity == pytest.approx(1 / 1.04**0.5)
    assert torch.equal(entry.top_layer_kv[0], kv_of(2, 1)[0])
    assert torch.equal(entry.top_layer_kv[1], kv_of(2, 1)[1])
    assert torch.equal(entry.task_embedding, direction(1))
    assert entry.lsh_hash == one.search(direction(1)).entry.lsh_hash  # type: ignore[union-attr]
    assert len(other) == 1, "it is the other's own now"
    assert memory.stats.hits == 1
    assert found_by(other, 1) == "task 1"
    assert memory.stats.hits == 1
    statistics = other.get_statistics()
    assert (statistics["num_shared_tasks"], statistics["num_shared_hits"], statistics["num_hits"]) == (3, 1, 2)


def test_all_layers_and_the_prompt_come_back(path: Path) -> None:
    memory = MemoryStore(1 << 20)
    one, other = manager_of(memory, path, ALIGNED), manager_of(memory, path, ALIGNED)
    top, whole = whole_of(5, 7)
    one.add_task("a", direction(0), top, whole)
    one.add_task("without all layers", direction(1), top)
    entry = other.search_similar_task(direction(0))
    assert entry is not None
    assert entry.whole_kv is not None
    assert entry.whole_kv.chunk == whole.chunk
    assert torch.equal(entry.whole_kv.kv, whole.kv)
    assert torch.equal(entry.top_layer_kv[0], top[0])
    assert torch.equal(entry.top_layer_kv[1], top[1])
    assert found_by(other, 1) is None
    assert found_by(one, 1) == "without all layers"


def test_a_shared_last_layer_is_no_chunk(path: Path) -> None:
    """Mode "aligned" of a server whose tasks are those of "top_layer" finds none it could use."""
    memory = MemoryStore(1 << 20)
    one, other = manager_of(memory, path), manager_of(memory, path)
    one.add_task("a", direction(0), kv_of(5, 0), token_ids=as_token_ids(range(5)))
    assert other.search(direction(0), lambda task: task.chunk is not None) is None
    match = other.search(direction(0))
    assert match is not None
    assert match.entry.token_ids is not None
    assert match.entry.token_ids.tolist() == list(range(5))


def test_the_more_similar_of_own_and_shared_tasks_is_used(path: Path) -> None:
    memory = MemoryStore(1 << 20)
    one, other = manager_of(memory, path), manager_of(memory, path)
    other.add_task("own", direction(0) + 0.3 * direction(1), kv_of(2, 0))
    one.add_task("shared", direction(0), kv_of(2, 1))
    assert found_by(one, 0) == found_by(other, 0) == "shared"
    nearer_own = other.search(direction(0) + 0.3 * direction(1))
    assert nearer_own is not None
    assert nearer_own.entry.task_id == "own"
    assert memory.stats.hits == 1


def test_a_salt_is_asked_before_anything_is_fetched(path: Path) -> None:
    memory = MemoryStore(1 << 20)
    manager_of(memory, path).add_task("a", direction(0), kv_of(2, 0), salt="mine")
    other = manager_of(memory, path)
    seen: list[KnownTask] = []

    def is_usable(task: KnownTask) -> bool:
        seen.append(task)
        return task.salt == "yours"

    assert other.search(direction(0), is_usable) is None
    assert [(task.salt, task.num_tokens) for task in seen] == [("mine", 2)]
    assert memory.stats.hits + memory.stats.misses == 0


@pytest.mark.parametrize(
    "other_format",
    [
        replace(FORMAT, model_id="llama-2"),
        replace(FORMAT, mode="aligned"),
        replace(FORMAT, kv_shape=replace(SHAPE, dtype=torch.bfloat16)),
        replace(FORMAT, kv_shape=replace(SHAPE, num_layers=2)),
    ],
)
def test_tasks_of_another_model_are_never_found(path: Path, other_format: TaskFormat) -> None:
    memory = MemoryStore(1 << 20)
    manager_of(memory, path).add_task("a", direction(0), kv_of(2, 0))
    assert found_by(manager_of(memory, path, other_format), 0) is None
    assert memory.stats.misses == 0


def test_kv_of_another_format_is_refused(path: Path) -> None:
    manager = manager_of(MemoryStore(1 << 20), path)
    keys, values = kv_of(3, 0)
    with pytest.raises(ValueError, match=r"llama-1-top_layer.*torch.bfloat16"):
        manager.add_task("a", direction(0), (keys.bfloat16(), values.bfloat16()))
    assert len(manager) == manager.get_statistics()["num_shared_tasks"] == 0
    with pytest.raises(ValueError, match=f"embedding_dim is {DIM}; the model's embeddings have 5"):
        manager.share(SharedTasks(MemoryStore(1), path, replace(FORMAT, embedding_dim=5)))


@pytest.mark.parametrize("damage", ["lost", "cut", "a bit", "another task's", "another shape"])
def test_lost_or_damaged_kv_is_a_miss_and_its_row_goes(store: FileStore, path: Path, damage: str) -> None:
    one, other = manager_of(store, path), manager_of(store, path)
    one.add_task("a", direction(0), kv_of(6, 0))
    (file,) = store.paths()
    if damage == "lost":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    else:
        kv = torch.load(file)
        kv[1, 0, 2, 3] = -kv[1, 0, 2, 3]
        kv = {"a bit": kv, "another task's": torch.randn_like(kv), "another shape": kv[:, :, 1:]}[damage]
        torch.save(kv, file)
    assert found_by(other, 0) is None
    assert found_by(manager_of(store, path), 0) is None
    statistics = other.get_statistics()
    assert (statistics["num_shared_lost"], statistics["num_misses"], statistics["num_hits"]) == (1, 1, 0)
    assert found_by(one, 0) == "a", "it has its own copy"
    one.add_task("a", direction(0), kv_of(6, 0))
    assert found_by(other, 0) == "a"


def test_a_store_that_is_down_costs_hits_and_forgets_nothing(store: FileStore, path: Path) -> None:
    one, other = manager_of(store, path), manager_of(store, path)
    one.add_task("a", direction(0), kv_of(3, 0))
    store.is_down = True
    assert found_by(other, 0) is None
    one.add_task("b", direction(1), kv_of(3, 1))
    assert found_by(one, 1) == "b"
    assert one.get_statistics()["num_store_errors"] == 2
    store.is_down = False
    assert found_by(other, 0) == "a"
    assert found_by(other, 1) is None, "it was never listed"


def test_a_damaged_directory_costs_sharing_only(store: FileStore, path: Path) -> None:
    path.write_bytes(b"not a database" * 100)
    one, other = manager_of(store, path), manager_of(store, path)
    one.add_task("a", direction(0), kv_of(3, 0))
    assert found_by(one, 0) == "a"
    assert found_by(other, 0) is None


@pytest.mark.parametrize(
    ("column", "value"), [("embedding", b"short"), ("embedding", b"\xff" * 4 * DIM), ("token_ids", b"12345")]
)
def test_a_damaged_row_is_as_if_it_werent_there(store: FileStore, path: Path, column: str, value: bytes) -> None:
    manager_of(store, path).add_task("a", direction(0), kv_of(3, 0), token_ids=as_token_ids([1, 2, 3]))
    with sqlite3.connect(path) as file:
        file.execute(f"UPDATE tasks SET {column} = ?", (value,))
    other = manager_of(store, path)
    assert found_by(other, 0) is None
    other.add_task("b", direction(0), kv_of(3, 1))
    assert found_by(manager_of(store, path), 0) == "b"


def test_the_least_recently_used_row_goes_first(store: FileStore, path: Path) -> None:
    one, other = manager_of(store, path, max_tasks=3), manager_of(store, path, max_tasks=3)
    for number in range(3):
        one.add_task(str(number), direction(number), kv_of(2, number))
    assert found_by(other, 0) == "0", "so it is used after 1"
    one.add_task("3", direction(3), kv_of(2, 3))
    fresh = manager_of(store, path, max_tasks=3)
    assert [found_by(fresh, number) for number in range(4)] == ["0", None, "2", "3"]
    assert fresh.get_statistics()["num_shared_tasks"] == 3


def test_reset_forgets_for_all(store: FileStore, path: Path) -> None:
    one, other = manager_of(store, path), manager_of(store, path)
    one.add_task("a", direction(0), kv_of(2, 0))
    one.add_task("b", direction(1), kv_of(2, 1))
    assert found_by(other, 0) == "a"
    one.reset()
    assert found_by(one, 0) is found_by(other, 1) is None
    assert found_by(other, 0) == "a", "its own copy"
    assert not any(value for name, value in one.get_statistics().items() if name.startswith("num_shared"))


def test_many_managers_and_threads(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random operations: whatever is found is what was last added under that name, whole."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 30.0)
    memory = MemoryStore(budget_bytes=40_000)
    managers = [manager_of(memory, path, max_tasks=12, max_cache_size=4) for _ in range(3)]

    def work(seed: int) -> int:
        rng, num_found = random.Random(seed), 0
        for _ in range(60):
            manager, number = rng.choice(managers), rng.randrange(DIM)
            if rng.random() < 0.5:
                manager.add_task(str(number), direction(number), kv_of(4 + number, number))
            elif rng.random() < 0.02:
                manager.reset()
            elif (found := manager.search_similar_task(direction(number))) is not None:
                num_found += 1
                assert found.task_id == str(number)
                assert torch.equal(found.top_layer_kv[0], kv_of(4 + number, number)[0])
            manager.check_integrity()
        return num_found

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) > 50
    memory.check_integrity()
    assert memory.stats.evictions > 0
    for manager in managers:
        statistics = manager.get_statistics()
        assert statistics["num_bytes"] == sum(2 * 4 * kv.num_tokens * 16 for kv in manager._entries.values())
