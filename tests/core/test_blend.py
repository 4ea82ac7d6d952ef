"""The blend's order, its counts after failures and its time budget, over a model and a store that only take notes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvarena.core import blend, placement
from kvarena.core.blend import Blender, BlendTask
from kvarena.core.plan import Chunk, ReusePlan, Span, TokenIds, as_token_ids
from kvarena.core.policy import RecomputeAll, RecomputeNone, SelectionPolicy
from kvarena.core.prefilled_model import (
    EndForward,
    InPieces,
    LayerAttention,
    LayerKV,
    OneRank,
    OnLayer,
    Ranks,
    TokenFilter,
)
from kvarena.core.report import (
    MAX_TOKEN_SCORES,
    MIN_RATIO,
    REMEMBERED_WAYS,
    RESERVE_RATIO,
    BlendCosts,
    BlendReport,
    TokenScores,
)
from kvarena.core.rope import Rotation
from kvarena.core.store import FoundKV, Pieces
from kvarena.policies.chunk_head import ChunkHead
from kvarena.policies.kv_deviation import KVDeviation
from kvarena.policies.query_attention import QueryAttention
from kvarena.stores.memory import MemoryStore
from kvarena.stores.tensor_parallel import TensorParallelStore
from support.thread_ranks import ThreadRanks

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

    What it computes anew at a position differs from what was written there by `deviations[position]`. One that `lags`
    only launches, as a GPU does: time passes when it is waited for.
    """

    rotations: Sequence[Rotation | None] = (ROTATION,) * NUM_LAYERS
    attention: Sequence[LayerAttention] = (LayerAttention(HEAD_SIZE**-0.5),) * NUM_LAYERS
    head_size = HEAD_SIZE
    device = torch.device("cpu")
    ranks: Ranks = OneRank()
    rotate_and_write = None

    def __init__(self, num_tokens: int, clock: Clock | None = None) -> None:
        self.cache = torch.full((NUM_LAYERS, 2, num_tokens, NUM_HEADS, HEAD_SIZE), torch.nan)
        self.deviations = torch.zeros(num_tokens)
        self.calls: list[Any] = []
        self.computed: list[list[int]] = []
        self.fails: dict[str, int] = {}
        self.failure: type[Exception] = RuntimeError
        self.has_room = True
        self.scale = 1.0
        self.clock = clock or Clock()
        self.write_ms = self.token_ms = self.launched_ms = 0.0
        self.lags = False
        self.on_wait: Callable[[], None] = lambda: None

    def wait(self) -> None:
        self.on_wait()
        self.clock.pass_ms(self.launched_ms)
        self.launched_ms = 0.0

    def prefill_chunks(self, chunks: Sequence[Chunk], piece_tokens: int) -> InPieces[list[torch.Tensor | None]]:
        self._note("prefill_chunks", [len(chunk) for chunk in chunks])
        for _ in range((sum(map(len, chunks)) - 1) // piece_tokens):
            yield
        return [kv_of(chunk.token_ids) * self.scale if self.has_room else None for chunk in chunks]

    def write(self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._note("write", positions.tolist())
        self._spend(self.write_ms)
        self.cache[:, 0, positions], self.cache[:, 1, positions] = keys, values

    def forward(self, positions: torch.Tensor, filters: Sequence[TokenFilter] = ()) -> torch.Tensor:
        self._note("forward", positions.tolist(), [token_filter.layer for token_filter in filters])
        for token_filter in filters:
            fresh = self.cache[token_filter.layer][:, positions] + self.deviations[positions][:, None, None]
            try:
                positions = positions[token_filter.choose(positions, LayerKV(*fresh))]
            except EndForward:
                return positions[:0]
        self._spend(self.token_ms * len(positions))
        self.computed.append(positions.tolist())
        return positions

    def observe(self, positions: torch.Tensor, on_layer: OnLayer) -> None:
        self._note("observe", positions.tolist())
        for layer in range(NUM_LAYERS):
            fresh = self.cache[layer][:, positions] + self.deviations[positions][:, None, None]
            with suppress(EndForward):
                on_layer(layer, positions, torch.ones(len(positions), NUM_HEADS, HEAD_SIZE), LayerKV(*fresh))
                continue
            self.calls[-1] += (layer,)  # where it ended
            return

    def _spend(self, passed_ms: float) -> None:
        if self.lags:
            self.launched_ms += passed_ms
        else:
            self.clock.pass_ms(passed_ms)

    def _note(self, name: str, *what: object) -> None:
        self.calls.append((name, *what))
        if self.fails.get(name, 0):
            self.fails[name] -= 1
            raise self.failure(f"{name} failed")


class TwoAlike(OneRank):
    """Two ranks, of which the other says the same."""

    num_ranks = 2

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x.float().cpu()


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
        self.on_end: Callable[[], None] = lambda: None

    @contextmanager
    def retrieval(self, chunks: Sequence[Chunk]) -> Iterator[NotedRetrieval]:
        self.note("look up", chunks)
        with super().retrieval(chunks) as retrieval:
            yield NotedRetrieval(retrieval.found, self, chunks, all_scores=retrieval.all_scores)
            self.on_end()

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
        return blender.blend(model, BlendTask(plan, 0, END, policy, **settings))
    finally:
        blender.close()


def counts(report: BlendReport) -> tuple[int, int, int]:
    recomputed = {at for start, end in report.recomputed_spans for at in range(start, end)}
    assert len(recomputed) == sum(end - start for start, end in report.recomputed_spans) == report.num_recomputed_tokens
    assert recomputed <= {at for start, end in report.spans for at in range(start, end)}
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
        ("write", list(range(2, 12))),
        ("write", list(range(14, 19))),
        ("forward", list(range(END)), [CHECK_LAYER]),
    ]
    assert counts(report) == (8, 2, 10), "the missing chunk's tokens are computed, also the one that was chosen"
    assert (report.store_hits, report.store_misses, report.blend_failures) == (2, 1, 0)
    assert (report.ratio, report.spans, report.computed_spans) == (3 / 15, [(2, 6), (6, 12)], [(14, 19)])
    again = blended(store, model, deviation(ratio=3 / 15))
    assert (counts(again), again.computed_spans) == ((12, 3, 5), [])
    assert again.spans == [(2, 6), (6, 12), (14, 19)]


def test_the_stores_memory_isnt_given_back_while_a_device_reads_it(store: FakeStore, model: FakeModel) -> None:
    order: list[str] = []
    model.on_wait = lambda: order.append(f"waited after {model.calls[-1][0]}")
    store.on_end = lambda: order.append("given back")
    blended(store, model, RecomputeNone())
    assert order[: order.index("given back")][-1] == "waited after write"


def test_a_chunk_is_put_into_the_store_once_its_kv_is_computed(
    store: FakeStore, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread copies it from the device, on a stream of its own."""
    order: list[str] = []
    model.on_wait = lambda: order.append(f"waited after {model.calls[-1][0]}")
    put = store.put

    def noted(chunk: Chunk, kv: torch.Tensor) -> bool:
        order.append("put")
        return put(chunk, kv)

    monkeypatch.setattr(store, "put", noted)
    blended(store, model, RecomputeNone())
    assert order.index("waited after prefill_chunks") < order.index("put")


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


@pytest.mark.parametrize("policy", [RecomputeNone(), deviation(0.4), deviation(1.0), ChunkHead(0.5)])
def test_of_an_empty_store_nothing_is_reused(model: FakeModel, policy: SelectionPolicy) -> None:
    store = FakeStore()
    report = blended(store, model, policy)
    assert (counts(report), report.spans) == ((0, 0, END), [])
    assert report.computed_spans == [(2, 6), (6, 12), (14, 19)]
    assert report.misses == [(2, 6, "not_stored"), (6, 12, "not_stored"), (14, 19, "not_stored")]


def test_a_store_that_couldnt_be_asked_is_the_reason(model: FakeModel) -> None:
    class Down(MemoryStore):
        @contextmanager
        def retrieval(self, chunks: Sequence[Chunk]) -> Iterator[FoundKV]:
            yield FoundKV([None] * len(chunks), failed=True)

    store = Down(1 << 20)
    report = blended(store, model, RecomputeNone())
    assert [reason for *_, reason in report.misses] == ["store_down"] * 3
    blender = Blender(store)
    assert blender.missing([FIRST, SECOND]) == ["store_down"] * 2


def test_a_put_that_hangs_is_waited_for_no_longer_than_the_time_out(
    store: FakeStore, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blend, "PUT_TIMEOUT_S", 0.01)
    go_on, put = threading.Event(), store.put
    monkeypatch.setattr(store, "put", lambda chunk, kv: go_on.wait(60) and put(chunk, kv))
    blender = Blender(store)
    try:
        for _ in range(2):
            report = blender.blend(model, BlendTask(PLAN, 0, END, RecomputeNone()))
            assert report.computed_spans == [(14, 19)], "it isn't there, so it is computed again"
        assert blender.missing([MISSING]) == ["not_stored"]
    finally:
        go_on.set()
        blender.close()


def test_looking_into_the_store_waits_for_what_is_on_its_way(store: FakeStore, model: FakeModel) -> None:
    blender = Blender(store)
    assert blender.missing([FIRST, MISSING]) == [None, "not_stored"]
    blender.blend(model, BlendTask(PLAN, 0, END, RecomputeNone()))
    assert blender.missing([SECOND, MISSING]) == [None, None]
    assert "take" not in [name for name, _ in store.calls[-1:]]


def test_a_new_chunk_that_stands_twice_is_computed_both_times(store: FakeStore, model: FakeModel) -> None:
    plan = ReusePlan((Span(2, 6, FIRST), Span(6, 11, MISSING), Span(14, 19, MISSING)))
    report = blended(store, model, deviation(0.0), plan)
    assert model.calls[0] == ("prefill_chunks", [5])
    assert (counts(report), report.spans) == ((4, 0, 16), [(2, 6)])
    assert (report.store_misses, report.misses) == (1, [(6, 11, "not_stored")])
    assert counts(blended(store, model, deviation(0.0), plan)) == (14, 0, 6)


def test_nothing_and_all(store: FakeStore, model: FakeModel) -> None:
    assert counts(blended(store, model, deviation(0.0))) == (10, 0, 10)
    assert counts(blended(store, model, deviation(0.0))) == (15, 0, 5)
    assert model.calls[-1] == ("forward", GAPS, [])
    assert counts(blended(store, model, deviation(1.0))) == (0, 15, 5)
    assert model.calls[-1] == ("forward", list(range(END)), [])


def test_a_policy_that_asks_the_question_first_gets_its_queries_before_the_forward(
    store: FakeStore, model: FakeModel
) -> None:
    report = blended(store, model, QueryAttention(0.2, CHECK_LAYER))
    assert [name for name, *_ in model.calls][-2:] == ["observe", "forward"]
    assert model.calls[-2] == ("observe", GAPS, CHECK_LAYER)
    assert counts(report) == (10, 0, 10), "all that were chosen are the missing chunk's"
    assert counts(blended(store, model, QueryAttention(0.2, CHECK_LAYER))) == (12, 3, 5)


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


def test_a_chunk_whose_kv_isnt_finite_is_computed_in_the_prompt_and_not_kept(
    store: FakeStore, model: FakeModel
) -> None:
    model.scale = float("inf")
    report = blended(store, model, RecomputeNone())
    assert (counts(report), report.store_misses) == ((10, 0, 10), 1)
    assert len(store) == 2


def test_what_the_store_loses_on_the_way_is_a_miss(store: FakeStore, model: FakeModel) -> None:
    store.loses = True
    report = blended(store, model, RecomputeNone())
    assert (counts(report), report.store_hits, report.store_misses) == ((0, 0, END), 0, 3)
    assert (report.spans, report.computed_spans) == ([], [(14, 19)])
    assert report.misses == [(2, 6, "store_down"), (6, 12, "store_down"), (14, 19, "not_stored")]
    assert report.blend_failures == 0


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, True),
        ({"store_new": False}, False),
        ({"unadmitted": frozenset({MISSING})}, False),
        ({"unadmitted": frozenset({SECOND})}, True),
    ],
)
def test_computed_chunks_are_kept_where_that_is_wanted(
    store: FakeStore, model: FakeModel, settings: dict[str, Any], kept: bool
) -> None:
    blended(store, model, RecomputeNone(), **settings)
    assert len(store) == 2 + kept
    report = blended(store, model, RecomputeNone(), **settings)
    assert report.store_hits == 2 + kept


@pytest.mark.parametrize("failing", ["look up", "take", "prefill_chunks", "write", "forward"])
def test_after_a_failure_the_whole_range_is_computed_and_nothing_counts_as_reused(
    store: FakeStore, model: FakeModel, failing: str
) -> None:
    store.fails, model.fails = failing, {failing: 1}
    report = blended(store, model, deviation(0.2), store_new=False)
    assert (report.blend_failures, counts(report), report.spans) == (1, (0, 0, END), [])
    assert model.calls[-1] == ("forward", list(range(END)), [])
    assert report.computed_spans == []
    store.fails = None
    store.put(MISSING, kv_of(MISSING.token_ids))
    assert counts(blended(store, model, deviation(0.2))) == (12, 3, 5), "the next one isn't harmed"


@pytest.mark.parametrize("group_tokens", [1, 100])
def test_a_rank_that_fails_to_write_takes_the_others_with_it_and_none_waits(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, group_tokens: int
) -> None:
    """Each compares with the others what was fetched, group after group, and what it chooses."""
    monkeypatch.setattr(placement, "GROUP_TOKENS", group_tokens)
    ranks, models = ThreadRanks(2), [FakeModel(END), FakeModel(END)]
    models[0].fails, models[0].failure = {"write": 1}, torch.OutOfMemoryError

    def run(model: FakeModel) -> BlendReport:
        model.ranks = ranks
        blender = Blender(TensorParallelStore(store, ranks))
        with closing(blender):
            return blender.blend(model, BlendTask(PLAN, 0, END, deviation(0.2), store_new=False))

    with ThreadPoolExecutor(2) as executor:
        reports = list(executor.map(run, models))
    for model, report in zip(models, reports, strict=True):
        assert (report.blend_failures, counts(report)) == (1, (0, 0, END))
        assert model.computed == [list(range(END))]


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistBackendError]
)
def test_a_rank_without_memory_for_a_forward_runs_nothing_else(
    failure: type[Exception], store: FakeStore, model: FakeModel
) -> None:
    """The others are in that forward, and would take the next one's collectives for its."""
    model.fails, model.failure = {"forward": 1}, failure
    assert blended(store, model, deviation(0.2)).blend_failures == 1, "alone it computes the prompt"
    model.fails = {"forward": 1}
    model.ranks, num_calls = TwoAlike(), len(model.calls)
    with pytest.raises(failure):
        blended(store, model, deviation(0.2))
    assert [call[0] for call in model.calls[num_calls:]].count("forward") == 1


def test_where_the_prompt_cant_be_computed_either_the_failure_goes_on(store: FakeStore, model: FakeModel) -> None:
    model.fails = {"forward": 2}
    with pytest.raises(RuntimeError, match="forward failed"):
        blended(store, model, deviation(0.2))


def test_a_report_has_what_happened_to_the_store_since_the_last_one(store: FakeStore, model: FakeModel) -> None:
    blender = Blender(store)
    blender.blend(model, BlendTask(PLAN, 0, END, RecomputeNone(), store_new=False))
    store.stats.errors += 2
    report = blender.blend(model, BlendTask(PLAN, 0, END, RecomputeNone(), store_new=False))
    assert (report.store_errors, report.store_evictions, report.store_entries) == (2, 0, 2)
    assert blender.blend(model, BlendTask(PLAN, 0, END, RecomputeNone(), store_new=False)).store_errors == 0


def in_pieces(
    blender: Blender, model: FakeModel, policy: SelectionPolicy, piece_tokens: int, wants_scores: bool = False
) -> tuple[BlendReport, InPieces[None]]:
    report = BlendReport(wants_scores=wants_scores)
    return report, blender.in_pieces(model, BlendTask(PLAN, 0, END, policy), report, piece_tokens)


@pytest.mark.parametrize("piece_tokens", [1, 4, 7, END])
@pytest.mark.parametrize(
    "policy",
    [
        RecomputeNone(),
        RecomputeAll(),
        deviation(0.4),
        KVDeviation(0.3, 0, num_filters=3),
        ChunkHead(0.5),
        QueryAttention(0.2, CHECK_LAYER),
    ],
)
def test_a_blend_in_pieces_is_the_same_blend(store: FakeStore, policy: SelectionPolicy, piece_tokens: int) -> None:
    whole, model = FakeModel(END), FakeModel(END)
    whole.deviations[:] = model.deviations[:] = torch.randperm(END).float()
    expected = blended(FakeStore(FIRST, SECOND), whole, policy)
    blender, other = Blender(store), FakeModel(END)
    report, pieces = in_pieces(blender, model, policy, piece_tokens)
    for _ in pieces:
        between = counts(blender.blend(other, BlendTask(PLAN, 0, END, deviation(1.0))))
        assert between in ((0, 10, 10), (0, 15, 5)), "others' blends go in between"
    assert [*itertools.chain(*model.computed)] == [*itertools.chain(*whole.computed)]
    assert all(len(piece) <= piece_tokens for piece in model.computed)
    assert torch.equal(model.cache.nan_to_num(), whole.cache.nan_to_num())
    assert (counts(report), report.spans) == (counts(expected), expected.spans)
    assert report.store_misses == expected.store_misses == 1


@pytest.mark.parametrize("piece_tokens", [4, END])
def test_the_scores_of_recomputed_tokens_are_told_to_those_who_ask(model: FakeModel, piece_tokens: int) -> None:
    def told(policy: SelectionPolicy, wants_scores: bool = True) -> BlendReport:
        blender = Blender(FakeStore(FIRST, SECOND))
        report, pieces = in_pieces(blender, model, policy, piece_tokens, wants_scores)
        for _ in pieces:
            pass
        assert report.blend_failures == 0
        assert blender.costs._seen, "what it took counts for blends within a time"
        return report

    model.deviations[:] = torch.randperm(END).float()
    for policy in (deviation(0.4), QueryAttention(0.4, CHECK_LAYER)):
        report = told(policy)
        assert report.token_scores
        recomputed = [at for start, end in report.recomputed_spans for at in range(start, end)]
        assert [at for at, *_ in report.token_scores.tokens] == recomputed != []
        assert told(policy, wants_scores=False).token_scores is None
        if isinstance(policy, QueryAttention):
            assert f"layer {CHECK_LAYER}" in report.token_scores.what
            assert {source for _, _, *sources in report.token_scores.tokens for source in sources} == {19}, (
                "the question"
            )
    assert told(ChunkHead(0.5)).token_scores is None, "it goes by no score"


def test_so_many_scores_are_told_at_most() -> None:
    scores = TokenScores.of("score", [torch.arange(9000), torch.rand(9000)])
    assert len(scores.among([(2, 8000)]).tokens) == MAX_TOKEN_SCORES
    assert scores.among([(2, 4), (7, 8)]).tokens == [scores.tokens[2], scores.tokens[3], scores.tokens[7]]


def test_a_blend_that_is_left_halfway_holds_nothing(store: FakeStore, model: FakeModel) -> None:
    blender = Blender(store)
    _, pieces = in_pieces(blender, model, RecomputeAll(), 5)
    with closing(pieces):
        next(pieces)
    assert next(pieces, "ended") == "ended"
    assert not model.computed
    assert counts(blender.blend(model, BlendTask(PLAN, 0, END, RecomputeAll()))) == (0, 15, 5)


def test_a_long_missing_chunk_is_computed_in_pieces(store: FakeStore, model: FakeModel) -> None:
    """All others waited for the whole of it."""
    report, pieces = in_pieces(Blender(store), model, RecomputeNone(), 2)
    assert [len(model.calls) for _ in pieces][:4] == [1, 1, 1, 3], "five tokens, two at a time; then the rest"
    assert (report.computed_spans, model.calls[0]) == ([(14, 19)], ("prefill_chunks", [5]))


def test_what_fails_between_pieces_is_computed_in_pieces(store: FakeStore, model: FakeModel) -> None:
    report, pieces = in_pieces(Blender(store), model, RecomputeAll(), 8)
    next(pieces)  # the missing chunk
    next(pieces)
    model.fails = {"forward": 1}
    assert len(list(pieces)) == 2, "between three pieces"
    assert model.computed[-3:] == [list(range(8)), list(range(8, 16)), list(range(16, END))]
    assert (report.blend_failures, counts(report)) == (1, (0, 0, END))


def test_only_the_last_ways_of_choosing_are_remembered() -> None:
    costs = BlendCosts()
    for number in range(3 * REMEMBERED_WAYS):
        costs.note(ChunkHead(0.5, head_tokens=number), 100, 50, 0.0, 1.0)
        costs.note(ChunkHead(0.5), 100, 50, 0.0, 1.0)
    assert len(costs._seen) == REMEMBERED_WAYS
    assert costs.ratio_within(ChunkHead(0.5), 100, 0, 1e6) == 1.0, "the one that is used stays"


LONG = chunk_of(0, 100)
LONG_PLAN = ReusePlan((Span(10, 110, LONG),))
LONG_END, NUM_COMPUTED = 120, 20
TOKEN_MS, WRITE_MS = 2.0, 15.0


@pytest.mark.parametrize(
    ("budget_ms", "left_ms"),
    [(115.0, 100.0), (75.0, 60.0), (15.0, 0.0), (-3.0, -18.0), (1e6, 1e6)],
)
@pytest.mark.parametrize("lags", [False, True], ids=["CPU", "GPU"])
def test_the_time_that_is_left_after_writing_chooses_the_ratio(
    budget_ms: float, left_ms: float, lags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(blend, "time", clock)
    monkeypatch.setattr("kvarena.core.report.time", clock)
    model, blender = FakeModel(LONG_END, clock), Blender(FakeStore(LONG))
    model.token_ms, model.write_ms, model.lags = TOKEN_MS, WRITE_MS, lags
    policy = ChunkHead(0.5)

    def within(budget_ms: float) -> BlendReport:
        return blender.blend(model, BlendTask(LONG_PLAN, 0, LONG_END, policy, budget_ms=budget_ms))

    first = within(1.0)
    assert (first.ratio, first.num_recomputed_tokens) == (0.5, 50), "nothing is known yet"
    assert (first.move_ms, first.write_ms) == pytest.approx((WRITE_MS, 0.0) if lags else (0.0, WRITE_MS))
    assert first.recompute_ms == pytest.approx(TOKEN_MS * (50 + NUM_COMPUTED))

    affordable = (1 - RESERVE_RATIO) * left_ms / TOKEN_MS - NUM_COMPUTED
    ratio = min(1.0, max(MIN_RATIO, affordable / len(LONG)))
    report = within(budget_ms)
    assert report.ratio == pytest.approx(ratio, abs=1e-4)
    assert report.num_recomputed_tokens == pytest.approx(ratio * len(LONG), abs=1)
    if 0 < affordable < len(LONG):
        assert report.blend_ms <= budget_ms
