"""The table of KV slots as `GET /slots` gives it, and what became of each slot between two looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Slot:
    """`num_tokens` of the slot have their KV; a pending token comes behind them. An empty one has no `topic`.

    The larger `last_used`, the later; 0: never.
    """

    index: int
    topic: str | None
    conversation: str | None
    num_tokens: int
    has_pending_token: bool
    in_use: bool
    last_used: int

    @property
    def holds(self) -> tuple[str | None, str | None]:
        return self.conversation, self.topic


@dataclass(frozen=True)
class SlotTable:
    slots: tuple[Slot, ...]
    ctx_len: int

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> SlotTable:
        slots = tuple(
            Slot(
                index=row["slot"],
                topic=row["topic"],
                conversation=row["conversation"],
                num_tokens=row["position"],
                has_pending_token=row["has_pending_token"],
                in_use=row["in_use"],
                last_used=row["last_used"],
            )
            for row in table["slots"]
        )
        return cls(slots, table["ctx_len"])

    def conversation_of(self, index: int) -> str | None:
        return next((slot.conversation for slot in self.slots if slot.index == index), None)

    def by_last_use(self) -> list[Slot]:
        """Those that hold something, the latest first."""
        return sorted((s for s in self.slots if s.topic is not None), key=lambda slot: -slot.last_used)


@dataclass(frozen=True)
class SlotChange:
    """A slot that holds another topic, or another conversation's, than before; None: nothing."""

    index: int
    before: str | None
    after: str | None

    def text(self) -> str:
        if self.before is None:
            return f"filled slot {self.index}: {self.after}"
        if self.after is None:
            return f"emptied slot {self.index} of {self.before}"
        return f"replaced slot {self.index}: {self.before} → {self.after}"


def changes(before: SlotTable, after: SlotTable) -> list[SlotChange]:
    """Slot by slot. A table of another size is that of another server: nothing can be said."""
    if len(before.slots) != len(after.slots):
        return []
    pairs = zip(before.slots, after.slots, strict=True)
    return [SlotChange(old.index, old.topic, new.topic) for old, new in pairs if old.holds != new.holds]
