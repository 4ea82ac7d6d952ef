"""Rows of `GET /slots`."""

from __future__ import annotations

from typing import Any


def row(index: int, topic: str | None = None, conversation: str | None = None, **more: Any) -> dict[str, Any]:
    empty = {"position": 0, "has_pending_token": False, "in_use": False, "last_used": 0}
    return {"slot": index, "topic": topic, "conversation": conversation, **empty, **more}
