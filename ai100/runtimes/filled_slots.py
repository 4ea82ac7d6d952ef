"""How many tokens each slot holds, and what may be asked of it: the same refusals for every runtime.

A slot is filled without holes, so a call reads nothing but what was written since the slot was last emptied: that is
how a slot's old text can't show, even where a device can't be told to wipe it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ai100.runtimes.runtime import DecodeRow, StaticShapes


@dataclass(frozen=True, slots=True)
class SlotRange:
    """The positions `[start, end)` of a slot, which one row of a run writes. It reads `[0, end)`."""

    slot: int
    start: int
    end: int


class FilledSlots:
    """The lengths of all slots. The methods that check raise `ValueError` naming the value and the bounds."""

    def __init__(self, shapes: StaticShapes, vocab_size: int) -> None:
        self._shapes = shapes
        self._vocab_size = vocab_size
        self._num_tokens = [0] * shapes.kv_cache_batch_size
        self._num_touched = [0] * shapes.kv_cache_batch_size

    def num_touched(self, slot: int) -> int:
        """How many positions were written since the slot was emptied: more than it holds when it went back."""
        self._check_slot(slot)
        return self._num_touched[slot]

    def prefill_range(self, slot: int, token_ids: Sequence[int], position: int) -> SlotRange:
        """What this prefill would write."""
        most = self._shapes.prefill_seq_len
        if not 1 <= len(token_ids) <= most:
            raise ValueError(f"{len(token_ids)} tokens to prefill; a run of the device takes 1 to {most}")
        return self._range(slot, token_ids, position)

    def decode_ranges(self, rows: Sequence[DecodeRow]) -> list[SlotRange]:
        """What this decode step would write, row by row."""
        most = self._shapes.full_batch_size
        if not 1 <= len(rows) <= most:
            raise ValueError(f"{len(rows)} rows to decode; a run of the device takes 1 to {most}")
        slots = [row.slot for row in rows]
        if len(set(slots)) < len(slots):
            raise ValueError(f"a slot stands twice in one batch: {slots}")
        return [self._range(row.slot, (row.token_id,), row.position) for row in rows]

    def touch(self, ranges: Iterable[SlotRange]) -> None:
        """These are about to be written."""
        for written in ranges:
            self._num_touched[written.slot] = max(written.end, self._num_touched[written.slot])

    def fill(self, ranges: Iterable[SlotRange]) -> None:
        """These were written; what was behind them is undefined now."""
        for written in ranges:
            self._num_tokens[written.slot] = written.end

    def empty(self, slot: int) -> None:
        self._num_tokens[slot] = self._num_touched[slot] = 0

    def empty_all(self) -> None:
        for slot in range(len(self._num_tokens)):
            self.empty(slot)

    def _range(self, slot: int, token_ids: Sequence[int], position: int) -> SlotRange:
        self._check_slot(slot)
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(f"no token {token_id}; the vocabulary has 0 to {self._vocab_size - 1}")
        held, end = self._num_tokens[slot], position + len(token_ids)
        if not 0 <= position <= held:
            raise ValueError(f"position {position} of slot {slot}, which holds {held} tokens; choose 0 to {held}")
        if end > self._shapes.ctx_len:
            raise ValueError(f"tokens up to position {end - 1} of slot {slot}; ctx_len is {self._shapes.ctx_len}")
        return SlotRange(slot, position, end)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self._num_tokens):
            raise ValueError(f"no slot {slot}; there are 0 to {len(self._num_tokens) - 1}")
