"""Moving spans together, from pieces, is moving each by itself, whole."""

from __future__ import annotations

import random
from typing import cast

import pytest
import torch

from kvarena.core import placement
from kvarena.core.placement import GROUP_TOKENS, ChunkSource, KVWriter, groups_of, packed, parts_of
from kvarena.core.plan import Chunk, Span, as_token_ids
from kvarena.core.prefilled_model import LayerAttention, PrefilledModel
from kvarena.core.report import BlendReport
from kvarena.core.rope import Rotation
from kvarena.core.store import FoundKV, Piece

NUM_LAYERS, NUM_HEADS, HEAD_SIZE = 3, 2, 8
ROTATIONS = [Rotation(torch.tensor([0.7, 0.2, 0.01])), None, Rotation(torch.tensor([1.0, 0.3]), is_neox=False)]


class Cache:
    """What was written, by layer: keys and values `(T, H_kv, D)`; NaN where nothing was."""

    rotations = ROTATIONS
    attention = [LayerAttention(HEAD_SIZE**-0.5)] * len(ROTATIONS)
    head_size = HEAD_SIZE
    device = torch.device("cpu")
    rotate_and_write = None

    def __init__(self, num_tokens: int) -> None:
        self.kv = torch.full((NUM_LAYERS, 2, num_tokens, NUM_HEADS, HEAD_SIZE), torch.nan)

    def write(self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.kv[:, 0, positions] = keys
        self.kv[:, 1, positions] = values


def kv_of(num_tokens: int) -> torch.Tensor:
    return torch.randn(2, NUM_LAYERS, num_tokens, NUM_HEADS * HEAD_SIZE)


def cut(kv: torch.Tensor, rng: random.Random) -> list[Piece]:
    """Into pieces that each end with a row or two that is no token's."""
    edges = sorted(rng.sample(range(1, kv.shape[2]), 3))
    return [slot_of(part, rng.randint(1, 2)) for part in kv.tensor_split(edges, dim=2)]


def slot_of(kv: torch.Tensor, num_rows: int) -> Piece:
    own = kv.new_full((*kv.shape[:2], num_rows, kv.shape[3]), torch.nan)
    return Piece(torch.cat((kv, own), dim=2), kv.shape[2])


def test_together_is_one_by_one() -> None:
    rng = random.Random(0)
    whole = [kv_of(40) for _ in range(3)]
    before = [kv.clone() for kv in whole]
    chunks = [Chunk(as_token_ids([number] * 40)) for number in range(3)]
    spans = [Span(0, 40, chunks[0]), Span(45, 70, chunks[1], 7), Span(70, 110, chunks[2]), Span(111, 121, chunks[1], 2)]
    together = Cache(125)
    writer = KVWriter(cast("PrefilledModel", together), [2], BlendReport())
    writer.write([(span, cut(whole[int(span.chunk.token_ids[0])], rng)) for span in spans])
    alone = Cache(125)
    for span in spans:
        kv = whole[int(span.chunk.token_ids[0])][:, :, span.offset : span.offset + len(span)]
        keys, values = kv.clone().view(2, NUM_LAYERS, len(span), NUM_HEADS, HEAD_SIZE)
        for own, rotation in zip(keys, ROTATIONS, strict=True):
            if rotation:
                here = torch.arange(span.offset, span.offset + len(span))
                rotation.between(here, here + span.start - span.offset).apply_(own)
        alone.write(torch.arange(span.start, span.end), keys, values)
    torch.testing.assert_close(together.kv, alone.kv, equal_nan=True)
    kept = torch.cat([group.keys for group in writer.kept[2]])
    written = alone.kv[2, 0][~alone.kv[2, 0, :, 0, 0].isnan()]
    torch.testing.assert_close(kept, written)
    assert list(writer.kept) == [2]
    assert all(torch.equal(kv, old) for kv, old in zip(whole, before, strict=True)), "the store's tensors were changed"


def test_pieces_of_several_devices_meet_on_the_models() -> None:
    """Chunks that were just computed lie where the model is, those of a store where that keeps them."""
    written: list[torch.Tensor] = []

    class Elsewhere(Cache):
        device = torch.device("meta")

        def write(self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
            written.extend((keys, values))

    first, second = kv_of(10), kv_of(10).to("meta")
    chunks = [Chunk(as_token_ids([number] * 10)) for number in range(2)]
    spans = [Span(0, 10, chunks[0]), Span(10, 20, chunks[1])]
    writer = KVWriter(cast("PrefilledModel", Elsewhere(20)), (), BlendReport())
    writer.write([(spans[0], [Piece.whole(first)]), (spans[1], [Piece.whole(second)])])
    assert [own.device.type for own in written] == ["meta", "meta"]
    assert written[0].shape == (NUM_LAYERS, 20, NUM_HEADS, HEAD_SIZE)


def test_what_goes_to_a_device_goes_whole_and_is_cut_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a piece isn't contiguous: it would be copied on the CPU first, into memory that isn't pinned. So is a
    piece without the row that LMCache's checksum has."""
    sent: list[torch.Tensor] = []
    to = torch.Tensor.to

    def noted(tensor: torch.Tensor, *where: object, **how: object) -> torch.Tensor:
        if tensor.dim() == 4:
            sent.append(tensor)
        return to(tensor, *where, **how)  # type: ignore[call-overload,no-any-return]

    class Elsewhere(Cache):
        device = torch.device("meta")

        def write(self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
            assert keys.shape[1] == len(positions)

    pieces = [slot_of(kv_of(8), 1) for _ in range(3)]
    span = Span(30, 46, Chunk(as_token_ids(range(24))), 3)
    monkeypatch.setattr(torch.Tensor, "to", noted)
    KVWriter(cast("PrefilledModel", Elsewhere(50)), (), BlendReport()).write([(span, pieces)])
    assert [id(tensor) for tensor in sent] == [id(piece.kv) for piece in pieces]


def test_positions_are_sent_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy that waits stops the launches of a whole group; the frequencies are there from the first one on."""
    waits: list[bool] = []
    to = torch.Tensor.to

    def noted(tensor: torch.Tensor, *where: object, **how: object) -> torch.Tensor:
        if where and isinstance(where[0], torch.device):
            waits.append(not how.get("non_blocking"))
        return to(tensor, *where, **how)  # type: ignore[call-overload,no-any-return]

    class Elsewhere(Cache):
        device = torch.device("meta")

        def write(self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
            pass

    new_to_the_device = Rotation(torch.tensor([0.7, 0.2, 0.01]))
    monkeypatch.setattr(Elsewhere, "rotations", [new_to_the_device] * NUM_LAYERS)
    span = Span(30, 40, Chunk(as_token_ids(range(10))))
    monkeypatch.setattr(torch.Tensor, "to", noted)
    writer = KVWriter(cast("PrefilledModel", Elsewhere(50)), (), BlendReport())
    for _ in range(2):
        writer.write([(span, [Piece.whole(kv_of(10))])])
    assert waits == [False] * 3 + [True] + [False] * 3, "KV, two lots of positions; once the frequencies"


def test_much_computed_kv_waits_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = kv_of(10)
    monkeypatch.setattr(placement, "MAX_DEVICE_BYTES", 2 * kv.nbytes)
    monkeypatch.setattr(placement, "to_host", lambda tensor: torch.zeros(tensor.shape))
    chunks = [Chunk(as_token_ids([number] * 10)) for number in range(4)]
    source = ChunkSource(chunks, FoundKV([None] * 4))
    kept = [source.add(chunk, kv.to("meta")) for chunk in chunks[:3]]
    assert [own.device.type for own in kept] == ["meta", "meta", "cpu"]
    assert source.add(chunks[3], kv) is kv
    spans = [Span(10 * number, 10 * number + 10, chunk) for number, chunk in enumerate(chunks)]
    assert [pieces[0].kv.device for _, pieces in source.take(spans)] == [own.device for own in [*kept, kv]]


def test_a_part_of_pieces_is_the_part_of_the_whole() -> None:
    rng = random.Random(1)
    for _ in range(50):
        kv = kv_of(rng.randint(5, 60))
        start = rng.randrange(kv.shape[2])
        num_tokens = rng.randint(1, kv.shape[2] - start)
        parts = [piece.kv[:, :, part] for piece, part in parts_of(cut(kv, rng), start, num_tokens)]
        assert torch.equal(torch.cat(parts, dim=2), kv[:, :, start : start + num_tokens])
        with pytest.raises(ValueError, match="not the"):
            list(parts_of(cut(kv, rng), start, kv.shape[2] - start + 1))


def test_groups_keep_order_and_are_no_larger_than_they_need() -> None:
    rng = random.Random(2)
    chunk = Chunk(as_token_ids(range(3000)))
    spans, at = [], 0
    for length in rng.choices([5, 90, 256, 700, 3000], k=60):
        spans.append(Span(at, at + length, chunk))
        at += length
    groups = list(groups_of(spans))
    assert [span for group in groups for span in group] == spans
    sizes = [[len(span) for span in group] for group in groups]
    assert all(sum(size[:-1]) < GROUP_TOKENS for size in sizes)
    assert all(sum(size) >= GROUP_TOKENS for size in sizes[:-1])


def test_as_many_as_have_room_go_together_and_a_larger_one_by_itself() -> None:
    packs = list(packed([3, 4, 3, 1, 12, 2, 10], lambda size: size, room=10))
    assert packs == [[3, 4, 3], [1], [12], [2], [10]]
    assert list(packed([], int, room=10)) == []
