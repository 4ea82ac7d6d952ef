"""One contract for every runtime: what is asked of `Runtime`, asked of each that this machine has."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ai100.runtimes import card
from ai100.runtimes.card import Buffers, ContextLengths, QEfficientRuntime, Session
from ai100.runtimes.host import HostRuntime
from ai100.runtimes.onnx_session import OnnxSession, export
from ai100.runtimes.runtime import DecodeRow, DeviceLost, Logits, ModelFiles, Runtime, StaticShapes
from ai100.settings import open_runtime
from support.tiny_models import FAMILIES, save_tiny_model

SHAPES = StaticShapes(prefill_seq_len=8, ctx_len=48, full_batch_size=3, kv_cache_batch_size=5)
NAMES = ("host", "onnx", "qaic")
TOLERANCE = {"host": 1e-4, "onnx": 1e-4, "qaic": 0.1}  # the card computes in 16 bits


@dataclass
class Subject:
    """A runtime, and what its slots should hold."""

    runtime: Runtime
    full_forward: Callable[[Sequence[int]], Logits]
    texts: dict[int, list[int]] = field(default_factory=dict)

    def prefill(self, slot: int, token_ids: Sequence[int], position: int | None = None) -> Logits:
        text = self.texts.setdefault(slot, [])
        position = len(text) if position is None else position
        logits = self.runtime.prefill(slot, token_ids, position)
        self.texts[slot] = [*text[:position], *token_ids]
        return logits

    def decode(self, token_ids: dict[int, int]) -> dict[int, Logits]:
        rows = [DecodeRow(slot, token, len(self.texts[slot])) for slot, token in token_ids.items()]
        logits = self.runtime.decode(rows)
        assert logits.shape == (len(rows), self.runtime.vocab_size)
        for row in rows:
            self.texts[row.slot].append(row.token_id)
        return dict(zip(token_ids, logits, strict=True))

    def fill(self, slot: int, token_ids: Sequence[int]) -> Logits:
        """In pieces, into an empty slot."""
        self.clear(slot)
        step = self.runtime.shapes.prefill_seq_len
        for start in range(0, len(token_ids), step):
            logits = self.prefill(slot, token_ids[start : start + step])
        return logits

    def clear(self, slot: int) -> None:
        self.runtime.clear(slot)
        self.texts[slot] = []

    def kv(self, slot: int) -> np.ndarray[Any, Any]:
        """A copy of all that the slot's memory holds; the ctx_len positions come last but one."""
        if isinstance(self.runtime, HostRuntime):
            return self.runtime.slot_kv(slot).numpy().copy()
        session: Any = self.runtime.session  # type: ignore[attr-defined]
        if not hasattr(session, "state"):
            pytest.skip(f"{self.runtime.name}: the device's memory can't be read")
        ctx_len = self.runtime.shapes.ctx_len
        return np.stack([value.numpy()[slot, :, :ctx_len] for value in session.state.values()])

    def check(self, slot: int, logits: Logits) -> None:
        expected = self.full_forward(self.texts[slot])
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE[self.runtime.name])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ai100")
    return {family: save_tiny_model(root / family, family) for family in FAMILIES}


@cache
def reference(folder: Path) -> Callable[[Sequence[int]], Logits]:
    """Hugging Face's own forward over a whole text, with no cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def full_forward(token_ids: Sequence[int]) -> Logits:
        logits: Logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0, -1].numpy()
        return logits

    return full_forward


@cache
def exported(folder: Path) -> Path:
    return export(str(folder), folder / "graph")


def opened(name: str, folder: Path, shapes: StaticShapes = SHAPES) -> Runtime:
    if name == "onnx":
        open_session = partial(OnnxSession, exported(folder), shapes)
        return QEfficientRuntime(open_session, ModelFiles.read(str(folder)), shapes, name)
    if name == "qaic" and (lacking := card.missing()):
        pytest.skip(f"this machine lacks {'; '.join(lacking)}")
    return open_runtime(name, str(folder), shapes)


@pytest.fixture(scope="session", params=[(name, family) for name in NAMES for family in FAMILIES], ids="-".join)
def shared(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Subject]:
    name, family = request.param
    runtime = opened(name, folders[family])
    yield Subject(runtime, reference(folders[family]))
    runtime.close()


@pytest.fixture
def subject(shared: Subject) -> Subject:
    for slot in range(shared.runtime.shapes.kv_cache_batch_size):
        shared.clear(slot)
    return shared


def tokens(rng: random.Random, count: int, vocab_size: int = 300) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(count)]


def test_it_says_what_it_runs(subject: Subject) -> None:
    runtime = subject.runtime
    assert runtime.shapes == SHAPES
    assert runtime.tokenizer.decode(runtime.tokenizer.encode("old tea")) == "old tea"
    assert runtime.vocab_size == 333
    assert runtime.eos_token_ids == {1}


@pytest.mark.parametrize("seed", range(2))
def test_any_cut_of_a_text_gives_the_logits_of_one_forward(subject: Subject, seed: int) -> None:
    """Random prefills, batches, steps back and clears, over all slots."""
    rng = random.Random(seed)
    slots = range(SHAPES.kv_cache_batch_size)
    for _ in range(25):
        slot = rng.choice(slots)
        free = SHAPES.ctx_len - len(subject.texts[slot])
        operation = rng.choice(["prefill", "prefill", "decode", "decode", "back", "clear"])
        if operation == "clear" or not free:
            subject.clear(slot)
        elif operation == "back":
            position = rng.randint(0, len(subject.texts[slot]))
            subject.check(slot, subject.prefill(slot, tokens(rng, 1), position))
        elif operation == "prefill":
            subject.check(slot, subject.prefill(slot, tokens(rng, rng.randint(1, min(free, SHAPES.prefill_seq_len)))))
        else:
            going_on = [slot for slot in slots if len(subject.texts[slot]) < SHAPES.ctx_len]
            batch = rng.sample(going_on, min(len(going_on), rng.randint(1, SHAPES.full_batch_size)))
            for slot, logits in subject.decode({slot: rng.randrange(300) for slot in batch}).items():
                subject.check(slot, logits)


def test_greedy_answers_in_one_batch_are_hugging_faces(subject: Subject) -> None:
    if subject.runtime.name == "qaic":
        pytest.skip("16 bits may part with float32 where two tokens are close")
    rng = random.Random(7)
    last = {slot: subject.fill(slot, tokens(rng, 5 + 4 * slot)) for slot in (4, 0, 2)}
    for _ in range(12):
        for slot, logits in last.items():
            assert logits.argmax() == subject.full_forward(subject.texts[slot]).argmax()
        last = subject.decode({slot: int(logits.argmax()) for slot, logits in last.items()})


def test_calls_leave_the_other_slots_kv_as_it_is(subject: Subject) -> None:
    rng = random.Random(3)
    for slot in range(5):
        subject.fill(slot, tokens(rng, 11))
    for call, untouched in (
        (lambda: subject.prefill(1, tokens(rng, 3)), (0, 2, 3, 4)),
        (lambda: subject.decode({3: 5}), (0, 1, 2, 4)),
        (lambda: subject.decode({4: 5, 0: 6}), (1, 2, 3)),
        (lambda: subject.clear(2), (0, 1, 3, 4)),
    ):
        before = [subject.kv(slot) for slot in untouched]
        call()
        for slot, kv in zip(untouched, before, strict=True):
            np.testing.assert_array_equal(subject.kv(slot), kv)


def test_a_call_writes_its_own_positions_only(subject: Subject) -> None:
    subject.fill(0, tokens(random.Random(4), 9))
    before = subject.kv(0)
    subject.prefill(0, [1, 2, 3])
    after = subject.kv(0)
    changed = (before != after).any(axis=tuple(set(range(before.ndim)) - {before.ndim - 2}))
    assert np.flatnonzero(changed).tolist() == [9, 10, 11]


def test_clear_leaves_nothing_of_the_text(subject: Subject) -> None:
    """What is left is the same whatever the text was, and none of it was the text's."""
    rng = random.Random(5)
    left, old = [], []
    for _ in range(2):
        subject.fill(1, tokens(rng, 13))
        subject.prefill(1, tokens(rng, 2), position=4)  # what came after goes too
        old.append(subject.kv(1)[..., :13, :])
        subject.clear(1)
        left.append(subject.kv(1))
    np.testing.assert_array_equal(left[0], left[1])
    assert not (left[0][..., :13, :] == old[0]).all(axis=-1).any()


def test_a_cleared_slot_answers_as_a_new_one(subject: Subject) -> None:
    rng = random.Random(6)
    subject.fill(0, tokens(rng, 30))
    new = tokens(rng, 10)
    np.testing.assert_array_equal(subject.fill(0, new), subject.fill(3, new))


def test_a_slot_holds_ctx_len_tokens_and_no_more(subject: Subject) -> None:
    rng = random.Random(8)
    subject.fill(2, tokens(rng, SHAPES.ctx_len - 2))
    subject.check(2, subject.decode({2: 9})[2])
    with pytest.raises(ValueError, match="ctx_len is 48"):
        subject.prefill(2, [1, 2])
    subject.check(2, subject.prefill(2, [7]))
    with pytest.raises(ValueError, match="ctx_len is 48"):
        subject.decode({2: 1})
    subject.check(0, subject.prefill(0, [5, 6]))


BAD_CALLS: list[tuple[str, Callable[[Runtime], object]]] = [
    ("no slot 5; there are 0 to 4", lambda runtime: runtime.prefill(5, [1], 0)),
    ("no slot -1", lambda runtime: runtime.decode([DecodeRow(0, 1, 6), DecodeRow(-1, 1, 0)])),
    ("no slot 9", lambda runtime: runtime.clear(9)),
    ("0 tokens to prefill; a run of the device takes 1 to 8", lambda runtime: runtime.prefill(0, [], 6)),
    ("9 tokens to prefill", lambda runtime: runtime.prefill(0, [1] * 9, 6)),
    ("0 rows to decode; a run of the device takes 1 to 3", lambda runtime: runtime.decode([])),
    ("4 rows to decode", lambda runtime: runtime.decode([DecodeRow(slot, 1, 6) for slot in range(4)])),
    ("twice in one batch", lambda runtime: runtime.decode([DecodeRow(0, 1, 6), DecodeRow(0, 2, 7)])),
    ("no token 333; the vocabulary has 0 to 332", lambda runtime: runtime.prefill(0, [1, 333], 6)),
    ("no token -1", lambda runtime: runtime.decode([DecodeRow(0, 1, 6), DecodeRow(1, -1, 6)])),
    ("position 7 of slot 0, which holds 6 tokens", lambda runtime: runtime.prefill(0, [1], 7)),
    ("position -1", lambda runtime: runtime.decode([DecodeRow(0, 1, -1)])),
    ("position 1 of slot 4, which holds 0 tokens", lambda runtime: runtime.prefill(4, [1], 1)),
]


def test_bad_arguments_are_refused_before_anything_is_touched(subject: Subject) -> None:
    rng = random.Random(9)
    for slot in (0, 1, 2, 3):
        subject.fill(slot, tokens(rng, 6))
    before = [subject.kv(slot) for slot in range(5)]
    for message, call in BAD_CALLS:
        with pytest.raises(ValueError, match=message):
            call(subject.runtime)
    for slot, kv in enumerate(before):
        np.testing.assert_array_equal(subject.kv(slot), kv)
    for slot, logits in subject.decode({1: 5, 0: 6}).items():
        subject.check(slot, logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shapes", [StaticShapes(1, 16, 2, 3), StaticShapes(4, 16, 1, 1), StaticShapes(16, 16, 4, 4)], ids=str
)
def test_the_smallest_and_fullest_shapes_run(name: str, shapes: StaticShapes, folders: dict[str, Path]) -> None:
    runtime = opened(name, folders["llama"], shapes)
    subject = Subject(runtime, reference(folders["llama"]))
    rng = random.Random(10)
    slots = range(shapes.full_batch_size)
    for slot in slots:
        subject.check(slot, subject.fill(slot, tokens(rng, 15)))
    for slot, logits in subject.decode({slot: rng.randrange(300) for slot in slots}).items():
        subject.check(slot, logits)
    runtime.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_runtime_is_a_lost_device_and_reopens_empty(name: str, folders: dict[str, Path]) -> None:
    subject = Subject(opened(name, folders["llama"]), reference(folders["llama"]))
    subject.fill(0, [1, 2, 3])
    subject.runtime.close()
    subject.runtime.close()
    for call in (lambda: subject.runtime.prefill(0, [1], 0), lambda: subject.runtime.clear(0)):
        with pytest.raises(DeviceLost):
            call()
    subject.runtime.reopen()
    with pytest.raises(ValueError, match="holds 0 tokens"):
        subject.runtime.prefill(0, [4], 3)
    subject.check(0, subject.fill(0, [4, 5]))
    subject.runtime.close()


class FailingSession:
    """A session that fails after some runs, as a card's does when it is lost: the one thing no test can do for real."""

    def __init__(self, session: Session, num_good_runs: int) -> None:
        self.session = session
        self.num_good_runs = num_good_runs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, inputs: Buffers) -> Buffers:
        self.num_good_runs -= 1
        if self.num_good_runs < 0:
            raise ValueError("Failed to run")
        return self.session.run(inputs)

    def deactivate(self) -> None:
        raise RuntimeError("no such device")


def test_a_device_lost_in_the_middle_says_so_until_it_is_reopened(folders: dict[str, Path]) -> None:
    whole = opened("onnx", folders["llama"])
    assert isinstance(whole, QEfficientRuntime)
    assert whole.session is not None
    made: list[Session | OSError] = [FailingSession(whole.session, 2), OSError("still no device"), whole.session]
    sessions = iter(made)

    def open_session() -> Session:
        session = next(sessions)
        if isinstance(session, OSError):
            raise session
        return session

    runtime = QEfficientRuntime(open_session, ModelFiles.read(str(folders["llama"])), SHAPES, name="onnx")
    subject = Subject(runtime, reference(folders["llama"]))
    subject.fill(0, [1, 2, 3])
    subject.fill(1, [4, 5])
    with pytest.raises(DeviceLost, match="Failed to run"):
        subject.decode({0: 6, 1: 7})
    with pytest.raises(DeviceLost, match="reopen it"):
        runtime.clear(0)
    with pytest.raises(DeviceLost, match="still no device"):
        runtime.reopen()
    runtime.reopen()
    with pytest.raises(ValueError, match="holds 0 tokens"):
        runtime.decode([DecodeRow(0, 6, 3)])
    subject.check(0, subject.fill(0, [8, 9]))


def test_a_cuda_error_is_a_lost_device(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = HostRuntime.load(str(folders["llama"]), SHAPES)

    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr("ai100.runtimes.host.SlotKV.update", lost)
        with pytest.raises(DeviceLost, match="launch failure"):
            runtime.prefill(0, [1, 2], 0)
        with pytest.raises(DeviceLost):
            runtime.prefill(0, [1, 2], 0)
    runtime.reopen()
    subject = Subject(runtime, reference(folders["llama"]))
    subject.check(0, subject.fill(0, [1, 2]))


def test_attention_over_a_part_of_the_context_is_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each run over the least compiled length that has its positions, of prefill or of decode, up to the last one."""
    folder, asked = folders["llama"], []

    class Listening(OnnxSession):
        def run(self, inputs: Buffers) -> Buffers:
            asked.append(inputs["comp_ctx_lengths"].shape[0])
            return super().run(inputs)

    graph = export(str(folder), tmp_path, has_context_lengths=True)
    lengths = ContextLengths(prefill=(12, 48), decode=(16, 32, 48))
    files = ModelFiles.read(str(folder))
    runtime = QEfficientRuntime(partial(Listening, graph, SHAPES), files, SHAPES, "onnx", lengths)
    subject = Subject(runtime, reference(folder))
    text = [1 + number % 7 for number in range(SHAPES.ctx_len)]
    subject.check(0, subject.fill(0, text[:14]))
    subject.check(2, subject.fill(2, text[:30]))
    for slots, expected in (((0,), 16), ((0, 2), 32), ((2,), 32), ((2, 0), 48)):
        for slot, logits in subject.decode(dict.fromkeys(slots, 3)).items():
            subject.check(slot, logits)
        assert asked[-1] == expected
    assert asked[:2] == [12, 48], "two pieces of a prefill"
    subject.check(1, subject.fill(1, text))
    with pytest.raises(ValueError, match="decode attends over 32 positions at most, and ctx_len is 48"):
        QEfficientRuntime(partial(Listening, graph, SHAPES), files, SHAPES, "onnx", ContextLengths((48,), (32,)))
