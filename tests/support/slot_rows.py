"""Rows of `GET /slots`, and the page's table of them."""

from __future__ import annotations

from typing import Any

from slots import SlotTable


def row(index: int, topic: str | None = None, conversation: str | None = None, **more: Any) -> dict[str, Any]:
    empty = {"position": 0, "has_pending_token": False, "in_use": False, "last_used": 0}
    return {"slot": index, "topic": topic, "conversation": conversation, **empty, **more}


def table(*rows: dict[str, Any]) -> SlotTable:
    return SlotTable.read({"slots": list(rows), "ctx_len": 200, "num_evictions": 0})
