"""The slots: which topic's tokens are in which, how far, and which is evicted when a new topic needs one.

Holds token ids only; what runs them is told by its caller, who does to the device what was agreed here.

| of a slot's tokens | in the slot |
|---|---|
| `token_ids`, `[0, position)` | have their KV there |
| `pending` | the last one drawn: it has no KV yet and comes first in the next prefill, if the text goes on with it |

A slot belongs to one topic of one conversation under one cache salt, or to a single turn that keeps nothing, and no
other ever reads it. While a turn holds it, it is given to nobody.

Where turns that keep nothing are to be expected, the last slot is theirs from the start, and topics never get it: once
all slots held topics, such a turn could only push one out, or wait for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Status(StrEnum):
    """What became of a topic's KV with a turn."""

    NEW_TOPIC = "NEW_TOPIC"
    INCREMENTAL_PREFILL = "INCREMENTAL_PREFILL"
    RESET_TOPIC = "RESET_TOPIC"
    FULL_PREFILL = "FULL_PREFILL"
    """Without the cache: nothing was looked for, nothing is kept."""


@dataclass(frozen=True, slots=True)
class SlotKey:
    """Whose a slot is."""

    cache_salt: str
    conversation: str
    topic: str


@dataclass
class Slot:
    """Written by `SlotTable` alone. `last_used` counts takings; larger is later. `is_aside`: no topic gets it."""

    index: int
    is_aside: bool = False
    key: SlotKey | None = None
    token_ids: list[int] = field(default_factory=list)
    pending: int | None = None
    in_use: bool = False
    last_used: int = 0

    @property
    def position(self) -> int:
        """Where the next token goes."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Taken:
    """`is_new`: the slot was another's, or nobody's; its device memory has to be cleared."""

    slot: Slot
    is_new: bool


class SlotTable:
    """Not thread-safe: it is the batcher's thread that takes and gives back. Others read copies (`rows`), and counts so
    far: slots that were taken from a topic for another, and turns that found tokens of theirs in their slot, or none.
    """

    def __init__(self, num_slots: int, ctx_len: int, *, sets_aside: bool = True) -> None:
        """`sets_aside`: the last slot, for turns that keep nothing. A single slot serves both."""
        self.ctx_len = ctx_len
        self.slots = [Slot(index) for index in range(num_slots)]
        self.slots[-1].is_aside = sets_aside and num_slots > 1
        self.num_evictions = 0
        self.num_hits = 0
        self.num_misses = 0
        self._clock = 0

    def has_room(self, key: SlotKey | None, *, evicts: bool = False) -> bool:
        """Whether `take` would give a slot now."""
        return self._slot_for(key, evicts) is not None

    def take(self, key: SlotKey | None, *, evicts: bool = False) -> Taken | None:
        """The topic's own slot, else an empty one, else the least recently used.

        Without a key one that nothing will be kept in: the slot that is set aside, else an empty one; else, where it
        `evicts` or none is set aside, the least recently used.

        `None`: wait, for the topic's slot is in use, or all are.
        """
        slot = self._slot_for(key, evicts)
        if slot is None:
            return None
        is_own = key is not None and slot.key == key
        if not is_own:
            self.num_evictions += slot.key is not None
            self.forget(slot)
        self._clock += 1
        slot.key, slot.in_use, slot.last_used = key, True, self._clock
        return Taken(slot, not is_own)

    def reuse(self, slot: Slot, token_ids: Sequence[int]) -> int:
        """How many first tokens of a text have their KV in the slot; what the slot has after them is forgotten.

        At least one token is left to run: its logits are needed.
        """
        self._check_held(slot)
        limit = min(slot.position, len(token_ids) - 1)
        count = next((at for at in range(limit) if slot.token_ids[at] != token_ids[at]), limit)
        del slot.token_ids[count:]
        slot.pending = None
        if slot.key is not None:
            self.num_hits += count > 0
            self.num_misses += count == 0
        return count

    def extend(self, slot: Slot, token_ids: Sequence[int]) -> None:
        """These tokens were run after those in the slot. Raises `ValueError` when they pass the context."""
        self._check_held(slot)
        if slot.position + len(token_ids) > self.ctx_len:
            raise ValueError(f"{slot.position} tokens and {len(token_ids)} more pass the context of {self.ctx_len}")
        slot.token_ids += token_ids
        slot.pending = None

    def set_pending(self, slot: Slot, token_id: int) -> None:
        self._check_held(slot)
        slot.pending = token_id

    def give_back(self, slot: Slot) -> None:
        """The turn has ended; the topic keeps the slot until somebody needs it more."""
        self._check_held(slot)
        if slot.key is None:
            self.forget(slot)
        slot.in_use = False

    def forget(self, slot: Slot) -> None:
        """Nothing in the slot can be relied on; it is nobody's now."""
        slot.key, slot.token_ids, slot.pending, slot.in_use, slot.last_used = None, [], None, False, 0

    def forget_all(self) -> None:
        for slot in self.slots:
            self.forget(slot)

    def rows(self) -> list[Slot]:
        """Copies. From any thread: a row is read while it may change, so it is a picture and no basis for decisions."""
        return [replace(slot, token_ids=list(slot.token_ids)) for slot in self.slots]

    def check_integrity(self) -> None:
        """Raises `AssertionError` where the table contradicts itself."""
        keys = [slot.key for slot in self.slots if slot.key is not None]
        assert len(set(keys)) == len(keys), "a topic has two slots"
        assert not any(slot.is_aside and slot.key for slot in self.slots), "a topic has the slot that is set aside"
        assert [slot.index for slot in self.slots] == list(range(len(self.slots))), "a slot moved"
        takings = [slot.last_used for slot in self.slots if slot.last_used]
        assert len(set(takings)) == len(takings), "two slots were taken at one time"
        for slot in self.slots:
            assert slot.position <= self.ctx_len, "a slot is longer than its context"
            assert slot.last_used <= self._clock, "a slot was used in the future"
            if slot.key is None and not slot.in_use:
                assert not slot.token_ids, "nobody's slot holds tokens"
                assert slot.pending is None, "nobody's slot has a pending token"

    def _slot_for(self, key: SlotKey | None, evicts: bool) -> Slot | None:
        if own := next((slot for slot in self.slots if key and slot.key == key), None):
            return None if own.in_use else own
        idle = [slot for slot in self.slots if not slot.in_use]
        if key is None and self.slots[-1].is_aside:
            empty = [slot for slot in idle if slot.key is None]
            if empty or not evicts:
                return min(empty, key=lambda slot: not slot.is_aside, default=None)
        topics = [slot for slot in idle if not slot.is_aside]
        return min(topics, key=lambda slot: (slot.key is not None, slot.last_used), default=None)

    def _check_held(self, slot: Slot) -> None:
        assert slot.in_use, f"slot {slot.index} is nobody's to change"
