"""What a turn on KV slots did: from the contender's report to HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

STATUS_LABELS = {
    "NEW_TOPIC": "new topic",
    "INCREMENTAL_PREFILL": "incremental prefill",
    "RESET_TOPIC": "topic reset",
    "FULL_PREFILL": "full prefill",
}


@dataclass(frozen=True)
class SlotTurn:
    """`turn` counts those of the topic, `prefill_ms` ends with the first token; times are the server's.

    `slot` and `status` are None for a turn that ended before it had a slot, `reason` says why a topic was reset,
    `notes` names those in its prompt.
    """

    topic: str
    slot: int | None
    turn: int
    status: str | None
    reason: str
    num_prefilled_tokens: int
    num_decoded_tokens: int
    prefill_ms: float
    decode_ms: float
    total_ms: float
    notes: str = ""

    @classmethod
    def read(cls, report: Mapping[str, Any]) -> SlotTurn:
        timings = report["timings"]
        return cls(
            topic=report["topic"],
            slot=report["slot"],
            turn=report["turn"],
            status=report["status"],
            reason=report.get("reason") or "",
            num_prefilled_tokens=report["num_prefilled_tokens"],
            num_decoded_tokens=report["num_decoded_tokens"],
            prefill_ms=timings["prefill_ms"],
            decode_ms=timings["decode_ms"],
            total_ms=timings["total_ms"],
            notes=report.get("notes") or "",
        )


def slot_turn_html(turn: SlotTurn) -> str:
    status = turn.status or ""
    slot = "no slot" if turn.slot is None else f"slot {turn.slot}"
    reason = f'<div data-testid="reset-reason">{escape(turn.reason)}</div>' if turn.reason else ""
    notes = f'<div data-testid="notes">notes: {escape(turn.notes)}</div>' if turn.notes else ""
    return (
        f'<div class="ka-task" data-testid="slot-turn" data-status="{escape(status)}" '
        f'data-topic="{escape(turn.topic)}" data-turn="{turn.turn}">'
        f'<span class="ka-badge ka-status-{escape(status)}">{escape(STATUS_LABELS.get(status, status))}</span> '
        f"<b>{escape(turn.topic)}</b> in {slot}, turn {turn.turn}: prefilled "
        f"{_number('num_prefilled_tokens', turn.num_prefilled_tokens, f'{turn.num_prefilled_tokens:,}')} tokens"
        f"{reason}{notes}<div>{_times(turn)}</div></div>"
    )


def _times(turn: SlotTurn) -> str:
    times = {"prefill": turn.prefill_ms, "decode": turn.decode_ms, "total": turn.total_ms}
    return ", ".join(f"{name} {_number(f'{name}_ms', ms, f'{ms:,.1f} ms')}" for name, ms in times.items())


def _number(key: str, value: float, text: str) -> str:
    return f'<b data-figure="{key}" data-value="{value!r}">{text}</b>'
