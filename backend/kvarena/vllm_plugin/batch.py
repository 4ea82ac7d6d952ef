"""Tokens of one or more sequences that are forwarded together, as vLLM's batches are: by rows.

A row is a stretch of neighbouring tokens of one sequence: so many query tokens, and all of the sequence up to the last
of them to attend to. Rows follow from the positions, with no loop over them, for a blend has a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """The tokens `[start, end)` of a sequence."""

    sequence: int
    start: int
    end: int


@dataclass(frozen=True)
class Batch:
    """`token_ids`, their `positions` and the number of each one's sequence: int64 `(T,)`, in order, on the CPU.

    `block_ids` `(S, G, N)`, int32, are the blocks of each sequence in each group of layers.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sequences: torch.Tensor
    block_ids: torch.Tensor

    @classmethod
    def of_one(cls, token_ids: torch.Tensor, positions: torch.Tensor, block_ids: torch.Tensor) -> Batch:
        """Tokens of a single sequence, whose blocks are `(G, N)`."""
        return cls(token_ids, positions, torch.zeros_like(positions), block_ids[None])

    @classmethod
    def of_whole(cls, texts: Sequence[torch.Tensor], block_ids: Sequence[torch.Tensor]) -> Batch:
        """Every token of each text, a sequence of its own, whose blocks are `(G, N)` of its own length N."""
        lengths = torch.tensor([len(text) for text in texts])
        blocks = torch.nn.utils.rnn.pad_sequence([own.t() for own in block_ids], batch_first=True)
        return cls(
            token_ids=torch.cat(list(texts)),
            positions=torch.cat([torch.arange(length) for length in lengths]),
            sequences=torch.arange(len(texts)).repeat_interleave(lengths),
            block_ids=blocks.transpose(1, 2),
        )

    def __len__(self) -> int:
        return len(self.positions)

    def split(self, max_tokens: int) -> list[Batch]:
        """In order, for what comes later may attend to what came before; cut wherever a part is full."""
        parts = (slice(start, start + max_tokens) for start in range(0, len(self), max_tokens))
        return [
            Batch(self.token_ids[part], self.positions[part], self.sequences[part], self.block_ids) for part in parts
        ]

    @cached_property
    def row_starts(self) -> torch.Tensor:
        """The number of each row's first token, and at the end that of all tokens: `(R + 1,)`, int32."""
        is_first = (self.positions.diff() != 1) | (self.sequences.diff() != 0)
        inner = is_first.nonzero().flatten() + 1
        return torch.cat([torch.tensor([0]), inner, torch.tensor([len(self)])]).int()

    @property
    def rows(self) -> list[Row]:
        starts, lengths = self.row_starts[:-1], self.row_lengths
        firsts = self.positions[starts]
        bounds = (self.sequences[starts], firsts, firsts + lengths)
        return [Row(*row) for row in zip(*(of.tolist() for of in bounds), strict=True)]

    @property
    def row_lengths(self) -> torch.Tensor:
        return self.row_starts.diff()

    @property
    def row_ends(self) -> torch.Tensor:
        """Where each row ends in its sequence: int32 `(R,)`."""
        return (self.positions[self.row_starts[1:] - 1] + 1).int()

    def row_blocks(self, group: int) -> torch.Tensor:
        """The blocks `(R, N)` of each row's sequence."""
        return self.block_ids[self.sequences[self.row_starts[:-1]], group]

    def slots(self, block_size: int) -> torch.Tensor:
        """Where the tokens lie in each group's cache, `(G, T)`; contiguous, as kernels take them for."""
        blocks = self.block_ids.long()[self.sequences, :, self.positions // block_size]
        return blocks.t().contiguous() * block_size + self.positions % block_size
