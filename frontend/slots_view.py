"""The picture of the KV slots: what is in each, how full it is, whose it is and how long ago it was used."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, wait
from html import escape

import streamlit as st

from chat_session import SlotSession
from contender_api import ContenderError, Message
from slots import NextTopic, Slot, SlotChat, SlotTable

FOLLOW_S = 0.3
FORETELL_S = 1.0
FORETELL_WAIT_S = 0.3
NUM_SHADES = 6


class SlotsView:
    """The picture's place on the page. `follow` keeps it up to date while an answer is under way, without waiting."""

    def __init__(self, session: SlotSession, chat: SlotChat) -> None:
        self._session, self._chat = session, chat
        self._place = st.empty()
        self._asked: Future[SlotTable] | None = None
        self._asked_s = 0.0

    def draw(self) -> SlotTable | None:
        """Asks and waits; None when the server doesn't say."""
        try:
            table = self._session.slots().result()
        except ContenderError as error:
            self._place.caption(str(error))
            return None
        self.show(table)
        return table

    def follow(self) -> None:
        if self._asked is None and time.monotonic() - self._asked_s >= FOLLOW_S:
            self._asked, self._asked_s = self._session.slots(), time.monotonic()
        if self._asked is not None and self._asked.done():
            asked, self._asked = self._asked, None
            if asked.exception() is None:
                self.show(asked.result())

    def show(self, table: SlotTable) -> None:
        self._place.html(slots_html(table, self._chat.conversations))


def slots_html(table: SlotTable, own: Collection[str]) -> str:
    """`own` are the conversations of the chat on the page."""
    ranks = {slot.index: rank for rank, slot in enumerate(table.by_last_use())}
    topics = sorted({topic for slot in table.slots if (topic := slot.told(own)) is not None})
    cells = "".join(_slot_html(slot, table.ctx_len, ranks, topics, own) for slot in table.slots)
    return f'<div class="ka-slots" data-testid="slots">{cells}</div>'


def _slot_html(slot: Slot, ctx_len: int, ranks: dict[int, int], topics: list[str], own: Collection[str]) -> str:
    topic = slot.told(own)
    attributes = f'data-testid="slot-{slot.index}" data-topic="{escape(topic or "")}" data-tokens="{slot.num_tokens}"'
    if topic is None:
        free_for = "kept for answers without slots" if slot.is_aside else "free for the next topic"
        return (
            f'<div class="ka-slot" {attributes}><div class="ka-slot-head"><b>Slot {slot.index}</b>'
            f'<span>empty</span></div><div class="ka-bar"></div><small>{free_for}</small></div>'
        )
    whose = "this chat" if slot.conversation in own else "another conversation"
    pending = " and the pending one" if slot.has_pending_token else ""
    shade = topics.index(topic) % NUM_SHADES
    return (
        f'<div class="ka-slot ka-shade-{shade}" {attributes}><div class="ka-slot-head"><b>Slot {slot.index}</b>'
        f"<span>{escape(topic)}</span></div>"
        f'<div class="ka-bar" title="{slot.num_tokens:,} of {ctx_len:,} tokens">'
        f'<span class="ka-part ka-filled" style="width:{100 * slot.num_tokens / ctx_len:.2f}%"></span></div>'
        f"<small>{slot.num_tokens:,} of {ctx_len:,} tokens{pending}<br>{whose}, {_last_used(slot, ranks)}</small></div>"
    )


def _last_used(slot: Slot, ranks: dict[int, int]) -> str:
    if slot.in_use:
        return "in use now"
    rank = ranks[slot.index]
    if rank == 0:
        return "used last"
    return "used longest ago" if rank == len(ranks) - 1 else f"used {rank} topic{'s' if rank > 1 else ''} before"


_FORETOLD = "foretold-topic"


def foretold_topic(session: SlotSession, messages: Sequence[Message], conversation: str) -> NextTopic | None:
    """Where the last message would go. None: the server hasn't said yet, so call it again. Of one message it is asked
    once, and what was asked of an earlier one is given up. Raises `ContenderError`.
    """
    wanted = session.contender.name, conversation, list(messages)
    for_what, asked = st.session_state.get(_FORETOLD, (None, None))
    if for_what != wanted:
        if asked:
            asked.cancel()
        asked = session.topic(messages, conversation)
        st.session_state[_FORETOLD] = wanted, asked
    wait([asked], FORETELL_WAIT_S)
    return asked.result() if asked.done() else None


def next_topic_html(topic: NextTopic | None, problem: str = "", is_chosen: bool = False) -> str:
    """The chip above the question box. None: nothing is typed yet, or the server doesn't say."""
    if topic is None:
        text = f"Its topic is known once it is asked. {problem}" if problem else "Its topic shows as you type"
        return f'<div class="ka-next" aria-live="polite" data-testid="next-topic" data-topic="">{escape(text)}</div>'
    begins = "Begins the topic" if topic.is_new else "Goes to"
    chosen = ", as you chose" if is_chosen else ""
    return (
        f'<div class="ka-next ka-next-{"new" if topic.is_new else "known"}" aria-live="polite" '
        f'data-testid="next-topic" data-topic="{escape(topic.name)}">{begins} <b>{escape(topic.name)}</b>{chosen}</div>'
    )
