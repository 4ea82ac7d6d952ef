"""Conversations: one chat on KV slots, each message answered with the slots and without, side by side.

Draws only; `chat_session.py` does all HTTP.
"""

from __future__ import annotations

from html import escape

import streamlit as st

import state
from question_box import asked_question, draw_question_box
from runs import OpenChat, Run
from sidebar import ConversationChoices, draw_conversation_sidebar
from slots import CACHED, SlotChat
from slots_view import SlotsView
from turns_view import draw_turns, watch

START_COMMAND = "./run-server.sh --contenders ai100"
NUM_HISTORY_LINES = 3


def main() -> None:
    st.html('<div class="ka-title">Conversations<small>a KV slot per topic, only new tokens prefilled</small></div>')
    try:
        opened = state.open_chat("conversation")
        choices = draw_conversation_sidebar(opened)
    except ValueError as error:
        st.error(str(error))
        st.stop()
    chat = opened.chat
    assert isinstance(chat, SlotChat)
    ask(opened, chat, choices)
    slots = draw_slots(opened, chat) if choices.is_up else None
    if slots is None:
        draw_not_running()
    view = draw_turns(opened)
    draw_question_box(opened, "Ask, change the topic, and come back to it", enabled=choices.is_up)
    if opened.run and view:
        watch(opened, opened.run, view, also=slots.follow if slots else lambda: None)


def ask(opened: OpenChat, chat: SlotChat, choices: ConversationChoices) -> None:
    question = asked_question()
    if question and choices.is_up and not opened.busy:
        sampling = choices.sampling(chat.name(choices.context))
        opened.run = Run.of_question(
            chat,
            choices.context,
            question,
            choices.sessions,
            sampling,
            choices.in_sequence,
        )


def draw_slots(opened: OpenChat, chat: SlotChat) -> SlotsView:
    """The picture, what the turns did to it, and what it saved so far."""
    with st.container(key="slots"):
        view = SlotsView(state.slot_sessions()[CACHED.name], chat)
        if (table := view.draw()) and not opened.busy:
            chat.note_slots(table)
            view.show(table)  # it may be known only now which slots are this chat's
        if told := _history_html(chat) + _saved_html(chat):
            st.html(told)
    return view


def draw_not_running() -> None:
    st.info(
        "This page needs the contender ai100, which isn't running. Start it alone, or name it beside others:",
        icon=":material/power_off:",
    )
    st.code(START_COMMAND, language="sh")


def _saved_html(chat: SlotChat) -> str:
    saved = chat.saved()
    if not saved.num_turns:
        return ""
    turns = f"{saved.num_turns} turn{'' if saved.num_turns == 1 else 's'}"
    attributes = f'data-ms="{saved.first_token_ms:.1f}" data-tokens="{saved.num_tokens}"'
    effect = f"{'saved' if saved.first_token_ms >= 0 else 'cost'} {abs(saved.first_token_ms) / 1000:,.2f} s"
    return (
        f'<div class="ka-speed" data-testid="saved" {attributes}>Slots {effect} '
        f"until the first tokens of {turns}, and saved the prefill of {saved.num_tokens:,} tokens</div>"
    )


def _history_html(chat: SlotChat) -> str:
    lines = escape(" · ".join(chat.slot_history[-NUM_HISTORY_LINES:]))
    return f'<div class="ka-notice" data-testid="slot-history">{lines}</div>' if lines else ""


main()
