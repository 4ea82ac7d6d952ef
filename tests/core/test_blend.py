"""The blend's order, its counts after failures and its time budget, over a model and a store that only take notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvarena.core import blend, placement, stopwatch
from kvarena.core.blend import MIN_RATIO, RESERVE_RATIO, Blender, BlendReport
from kvarena.core.plan import Chunk, ReusePlan, Span, TokenIds, as_token_ids
from kvarena.core.policy import RecomputeNone, SelectionPolicy
from kvarena.core.prefilled_model import LayerKV, OneRank, Ranks, TokenFilter
from kvarena.core.rope import Rotation
from kvarena.core.store import FoundKV, Pieces
from kvarena.policies.chunk_head import ChunkHead
from kvarena.policies.kv_deviation import KVDeviation
from kvarena.policies.query_attention import QueryAttention
from kvarena.stores.memory import MemoryStore

NUM_LAYERS, NUM_HEADS, HEAD_SIZE = 3, 2, 4
ROTATION = Rotation(torch.tensor([0.5, 0.1]))
CHECK_LAYER = 1


def chunk_of(first_token: int, num_tokens: int) -> Chunk:
    return Chunk(as_token_ids(range(first_token, first_token + num_tokens)))


def kv_of(token_ids: TokenIds) -> torch.Tensor:
    """`(2, L, T, H_kv * D)`: every number is the token's id."""
    tokens = torch.from_numpy(token_ids).float()[:, None]
    return tokens.expand(2, NUM_LAYERS, -1, NUM_HEADS * HEAD_SIZE).contiguous()


class Clock:
    now_s = 0.0

    def pass_ms(self, passed_ms: float) -> None:
        self.now_s += passed_ms / 1e3

    def perf_counter(self) -> float:
        return self.now_s


class FakeModel:
    """A `PrefilledModel` that notes its calls, and in `computed` which positions went through all layers.
    A call that is in `fails` raises, as often as that says.

    What it computes anew at a position differs from what was written there by `deviations[position]`.
    """

    rotations: Sequence[Rotation | None] = (ROTATION,) * NUM_LAYERS
    head_size = HEAD_SIZE
    device = torch.device("cpu")
    ranks: Ranks = OneRank()

    def __init__(self, num_tokens: int, clock: Clock | None = None) -> None:
        self.cache = torch.full((NUM_LAYERS, 2, num_tokens, NUM_HEADS, HEAD_SIZE), torch.nan)
        self.deviations = torch.zeros(num_tokens)
        self.calls: list[Any] = []
        self.computed: list[list[int]] = []
        self.fails: dict[str, int] = {}
        self.has_room = True
        self.clock = clock or Clock()
        self.write_ms = self.token_ms = 0.0

    def prefill_chunks(self, texts: Sequence[TokenIds]) -> list[torch.Tensor | None]:
        self._note("prefill_chunks", [len(text) for text in texts])
        return [kv_of(text) if self.has_room else None for text in texts]

    def write(self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._note("write", layer, positions.tolist())
        self.clock.pass_ms(self.write_ms)
        self.cache[layer, 0, positions], self.cache[layer, 1, positions] = keys, values

    def forward(self, positions: torch.Tensor, filters: Sequence[TokenFilter] = ()) -> torch.Tensor:
        self._note("forward", positions.tolist(), [token_filter.layer for token_filter in filters])
        for token_filter in filters:
            fresh = self.cache[token_filter.layer][:, positions] + self.deviations[positions][:, None, None]
            positions = positions[token_filter.choose(positions, LayerKV(*fresh))]
        self.clock.pass_ms(self.token_ms * len(positions))
        self.computed.append(positions.tolist())
        return positions

    def queries(self, positions: torch.Tensor, layer: int) -> torch.Tensor:
        self._note("queries", positions.tolist(), layer)
        return torch.ones(len(positions), NUM_HEADS, HEAD_SIZE)

    def _note(self, name: str, *what: object) -> None:
        self.calls.append((name, *what))
        if self.fails.get(name, 0):
            self.fails[name] -= 1
            raise RuntimeError(f"{name} failed")


@dataclass(frozen=True)
class NotedRetrieval(FoundKV):
    store: FakeStore
    chunks: Sequence[Chunk]

    def take(self, indices: Sequence[int]) -> list[Pieces | None]:
        self.store.note("take", [self.chunks[index] for index in indices])
        return [None] * len(indices) if self.store.loses else super().take(indices)


class FakeStore(MemoryStore):
    """Notes what is looked up and taken, and fails there or loses what it held where it is told to."""

    def __init__(self, *chunks: Chunk) -> None:
        super().__init__(1 << 20)
        for chunk in chunks:
            self.put(chunk, kv_of(chunk.token_ids))
        self.calls: list[tuple[str, list[int]]] = []
        self.fails: str | None = None
        self.loses = False

    @contextmanager
    def retrieval(self, chunks: Sequence[Chunk]) -> Iterator[NotedRetrieval]:
        self.note("look up", chunks)
        with super().retrieval(chunks) as retrieval:
            yield NotedRetrieval(retrieval.found, self, chunks)

    def note(self, name: str, chunks: Sequence[Chunk]) -> None:
        self.calls.append((name, [len(chunk) for chunk in chunks]))
        if self.fails == name:
            raise ConnectionError("the store is down")

    def close(self) -> None:
        """Keeps what it has for the next blender."""


FIRST, SECOND, MISSING = chunk_of(100, 4), chunk_of(200, 6), chunk_of(300, 5)
PLAN = ReusePlan((Span(2, 6, FIRST), Span(6, 12, SECOND), Span(14, 19, MISSING)))
END = 20
GAPS = [0, 1, 12, 13, 19]
"""The positions of `[0, 20)` that no chunk covers."""
REUSED = [position for position in range(END) if position not in GAPS]


@pytest.fixture
def model() -> FakeModel:
    return FakeModel(END)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore(FIRST, SECOND)


def blended(
    store: MemoryStore, model: FakeModel, policy: SelectionPolicy, plan: ReusePlan = PLAN, **settings: Any
) -> BlendReport:
    """By a blender of its own, whose puts are done when it returns."""
    blender = Blender(store)
    try:
        return blender.blend(model, plan, 0, END, policy, **settings)
    finally:
        blender.close()


def counts(report: BlendReport) -> tuple[int, int, int]:
    return report.num_reused_tokens, report.num_recomputed_tokens, report.num_computed_tokens


def deviation(ratio: float) -> KVDeviation:
    return KVDeviation(ratio, CHECK_LAYER)


def test_missing_chunks_are_computed_then_all_is_written_then_the_chosen_are_recomputed(
    store: FakeStore, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "GROUP_TOKENS", 8)  # the first two chunks go together
    model.deviations[[3, 11, 16]] = torch.tensor([1.0, 3.0, 2.0])
    report = blended(store, model, deviation(ratio=3 / 15))
    assert store.calls == [("look up", [4, 6, 5]), ("take", [4, 6]), ("take", [])]
    assert model.calls == [
        ("prefill_chunks", [5]),
        *(("write", layer, list(range(2, 12))) for layer in range(NUM_LAYERS)),
        *(("write", layer, list(range(14, 19))) for layer in range(NUM_LAYERS)),
        ("forward", list(range(END)), [CHECK_LAYER]),
    ]
    assert counts(report) == (12, 3, 5)
    assert (report.store_hits, report.store_misses, report.blend_failures) == (2, 1, 0)
    assert (report.ratio, report.spans) == (3 / 15, [(2, 6), (6, 12), (14, 19)])


def test_what_is_written_is_the_chunks_kv_moved_to_its_place(store: FakeStore, model: FakeModel) -> None:
    blended(store, model, RecomputeNone())
    tokens = torch.from_numpy(SECOND.token_ids).float()[:, None, None].expand(-1, NUM_HEADS, HEAD_SIZE)
    own = model.cache[:, :, 6:12]
    assert torch.equal(own[:, 1], tokens.expand(NUM_LAYERS, -1, -1, -1))
    assert torch.allclose(own[:, 0], ROTATION.move(tokens, 6).expand(NUM_LAYERS, -1, -1, -1))
    assert model.cache[:, :, GAPS].isnan().all()


@pytest.mark.parametrize("ratio", [1 / 15, 4 / 15, 14 / 15])
def test_the_most_deviating_are_recomputed_with_all_that_no_chunk_covers(
    store: FakeStore, model: FakeModel, ratio: float
) -> None:
    model.deviations[:] = torch.randperm(END).float()
    blended(store, model, deviation(ratio))
    by_deviation = sorted(REUSED, key=lambda position: -float(model.deviations[position]))
    assert model.computed == [sorted(GAPS + by_deviation[: round(15 * ratio)])]


def test_nothing_and_all(store: FakeStore, model: FakeModel) -> None:
    assert counts(blended(store, model, deviation(0.0))) == (15, 0, 5)
    assert model.calls[-1] == ("forward", GAPS, [])
    assert counts(blended(store, model, deviation(1.0))) == (0, 15, 5)
    assert model.calls[-1] == ("forward", list(range(END)), [])


def test_a_policy_that_asks_the_question_first_gets_its_queries_before_the_forward(
    store: FakeStore, model: FakeModel
) -> None:
    report = blended(store, model, QueryAttention(0.2, CHECK_LAYER))
    assert [name for name, *_ in model.calls][-2:] == ["queries", "forward"]
    assert model.calls[-2] == ("queries", GAPS, CHECK_LAYER)
    assert counts(report) == (12, 3, 5)


def test_what_begins_the_prompt_is_not_recomputed_but_with_ratio_1(store: FakeStore, model: FakeModel) -> None:
    plan = ReusePlan((Span(0, 4, FIRST), Span(4, 10, SECOND)))
    assert counts(blended(store, model, ChunkHead(0.5), plan)) == (7, 3, 10)
    assert model.calls[-1] == ("forward", [4, 5, 6, *range(10, END)], [])
    assert counts(blended(store, model, ChunkHead(1.0), plan)) == (0, 10, 10)
    assert model.calls[-1] == ("forward", list(range(END)), [])


def test_a_missing_part_or_one_without_room_is_computed_in_the_prompt(store: FakeStore, model: FakeModel) -> None:
    part = ReusePlan((Span(2, 6, FIRST), Span(14, 18, MISSING, offset=1)))
    report = blended(store, model, RecomputeNone(), part)
    assert "prefill_chunks" not in {name for name, *_ in model.calls}
    assert (counts(report), report.spans) == ((4, 0, 16), [(2, 6)])
    model.has_room = False
    report = blended(store, model, RecomputeNone())
    assert (counts(report), report.store_misses) == ((10, 0, 10), 1)
    assert model.calls[-1] == ("forward", [0, 1, *range(12, END)], [])


def test_what_the_store_loses_on_the_way_is_a_miss(store: FakeStore, model: FakeModel) -> None:
    store.loses = True
    report = blended(store, model, RecomputeNone())
    assert (counts(report), report.store_hits, report.store_misses) == ((5, 0, 15), 0, 3)
    assert report.blend_failures == 0


@pytest.mark.parametrize("store_new", [True, False])
def test_computed_chunks_are_kept_where_that_is_wanted(store: FakeStore, model: FakeModel, store_new: bool) -> None:
    blended(store, model, RecomputeNone(), store_new=store_new)
    assert len(store) == 2 + store_new
    report = blended(store, model, RecomputeNone(), store_new=store_new)
    assert report.store_hits == 2 + store_new


@pytest.mark.parametrize("failing", ["look up", "take", "prefill_chunks", "write", "forward"])
def test_after_a_failure_the_whole_range_is_computed_and_nothing_counts_as_reused(
    store: FakeStore, model: FakeModel, failing: str
) -> None:
    store.fails, model.fails = failing, {failing: 1}
    report = blended(store, model, deviation(0.2))
    assert (report.blend_failures, counts(report), report.spans) == (1, (0, 0, END), [])
    assert model.calls[-1] == ("forward", list(range(END)), [])
    store.fails = None
    assert counts(blended(store, model, deviation(0.2))) == (12, 3, 5), "the next one isn't harmed"


def test_where_the_prompt_cant_be_computed_either_the_failure_goes_on(store: FakeStore, model: FakeModel) -> None:
    model.fails = {"forward": 2}
    with pytest.raises(RuntimeError, match="forward failed"):
        blended(store, model, deviation(0.2))


def test_a_report_has_what_happened_to_the_store_since_the_last_one(store: FakeStore, model: FakeModel) -> None:
    blender = Blender(store)
    blender.blend(model, PLAN, 0, END, RecomputeNone(), store_new=False)
    store.stats.errors += 2
    report = blender.blend(model, PLAN, 0, END, RecomputeNone(), store_new=False)
    assert (report.store_errors, report.store_evictions, report.store_entries) == (2, 0, 2)
    assert blender.blend(model, PLAN, 0, END, RecomputeNone(), store_new=False).store_errors == 0


LONG = chunk_of(0, 100)
LONG_PLAN = ReusePlan((Span(10, 110, LONG),))
LONG_END, NUM_COMPUTED = 120, 20
TOKEN_MS, WRITE_MS = 2.0, 5.0


@pytest.mark.parametrize(
    ("budget_ms", "left_ms"),
    [(115.0, 100.0), (75.0, 60.0), (15.0, 0.0), (-3.0, -18.0), (1e6, 1e6)],
)
def test_the_time_that_is_left_after_writing_chooses_the_ratio(
    budget_ms: float, left_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(blend, "time", clock)
    monkeypatch.setattr(stopwatch, "time", clock)
    model, blender = FakeModel(LONG_END, clock), Blender(FakeStore(LONG))
    model.token_ms, model.write_ms = TOKEN_MS, WRITE_MS
    policy = ChunkHead(0.5)

    def within(budget_ms: float) -> BlendReport:
        return blender.blend(model, LONG_PLAN, 0, LONG_END, policy, budget_ms=budget_ms)

    first = within(1.0)
    assert (first.ratio, first.num_recomputed_tokens) == (0.5, 50), "nothing is known yet"
    assert first.write_ms == pytest.approx(NUM_LAYERS * WRITE_MS)
    assert first.recompute_ms == pytest.approx(TOKEN_MS * (50 + NUM_COMPUTED))

    affordable = (1 - RESERVE_RATIO) * left_ms / TOKEN_MS - NUM_COMPUTED
    ratio = min(1.0, max(MIN_RATIO, affordable / len(LONG)))
    report = within(budget_ms)
    assert report.ratio == pytest.approx(ratio, abs=1e-4)
    assert report.num_recomputed_tokens == pytest.approx(ratio * len(LONG), abs=1)
    if 0 < affordable < len(LONG):
        assert report.blend_ms <= budget_ms
