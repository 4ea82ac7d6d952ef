"""A batch's rows, slots and blocks are those that a loop over its tokens finds, whole or split."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarena.engines.vllm.model import Batch

BLOCK_SIZE = 4
NUM_GROUPS = 2
Token = tuple[int, int]
"""A token's sequence and position."""


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Some positions of a few sequences of up to 24 tokens, each with blocks of its own in two groups of layers."""
    taken = draw(st.lists(st.sets(st.integers(0, 23), min_size=1), min_size=1, max_size=4))
    sequences = [number for number, positions in enumerate(taken) for _ in positions]
    positions = [position for own in taken for position in sorted(own)]
    blocks = torch.randperm(len(taken) * NUM_GROUPS * 6, generator=torch.Generator().manual_seed(0))
    return Batch(
        token_ids=torch.arange(len(positions)) + 100,
        positions=torch.tensor(positions),
        sequences=torch.tensor(sequences),
        block_ids=blocks.view(len(taken), NUM_GROUPS, 6).int(),
    )


def tokens_of(batch: Batch) -> list[Token]:
    return list(zip(batch.sequences.tolist(), batch.positions.tolist(), strict=True))


@given(batches(), st.integers(1, 30))
def test_rows_are_the_stretches_of_neighbours(batch: Batch, max_tokens: int) -> None:
    parts = batch.split(max_tokens)
    assert torch.equal(torch.cat([part.token_ids for part in parts]), batch.token_ids)
    assert all(len(part) == max_tokens for part in parts[:-1])
    for part in parts:
        rows = part.rows
        assert [(row.sequence, at) for row in rows for at in range(row.start, row.end)] == tokens_of(part)
        assert not any(a.sequence == b.sequence and a.end == b.start for a, b in pairwise(rows))
        assert part.row_lengths.tolist() == [row.end - row.start for row in rows]
        assert part.row_ends.tolist() == [row.end for row in rows]
        for group in range(NUM_GROUPS):
            expected = torch.stack([batch.block_ids[row.sequence, group] for row in rows])
            assert torch.equal(part.row_blocks(group), expected)


@given(batches())
def test_slots_lie_in_the_blocks_of_their_sequence(batch: Batch) -> None:
    slots = batch.slots(BLOCK_SIZE)
    assert slots.is_contiguous(), "kernels don't look at strides"
    for group in range(NUM_GROUPS):
        for slot, (sequence, position) in zip(slots[group].tolist(), tokens_of(batch), strict=True):
            block = batch.block_ids[sequence, group, position // BLOCK_SIZE].item()
            assert slot == block * BLOCK_SIZE + position % BLOCK_SIZE


@pytest.mark.parametrize("lengths", [[3], [8, 1, 5]])
def test_whole_texts_are_sequences_of_their_own(lengths: list[int]) -> None:
    texts = [torch.arange(length) for length in lengths]
    blocks = [torch.full((NUM_GROUPS, -(-length // BLOCK_SIZE)), number) for number, length in enumerate(lengths)]
    batch = Batch.of_whole(texts, blocks)
    assert batch.rows == [(number, 0, length) for number, length in enumerate(lengths)]
    slots = batch.slots(BLOCK_SIZE)
    assert slots.shape == (NUM_GROUPS, sum(lengths))
    assert torch.equal(slots[0] // BLOCK_SIZE, batch.sequences)
