"""Draws the chat: per turn the question, who was first by how much, and a pane per contender; and the live turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.runtime.scriptrunner import StopException

from chats import OpenChat
from figures import prefix_cache_note, speed_line
from history import Chat, Turn
from panes import answer_html
from runs import Run

TICK_S = 0.08


class TurnView:
    """A turn's place on the page; `draw` brings it up to date."""

    def __init__(self, turn: Turn, key: str) -> None:
        self.turn = turn
        with st.container(key=key):
            self._speed = st.empty()
            columns = st.columns(max(len(turn.answers), 1))
            self._panes: list[DeltaGenerator] = [column.empty() for column in columns]

    def draw(self, only_live: bool = False) -> None:
        if html := speed_html(self.turn):
            self._speed.html(html)
        for pane, answer in zip(self._panes, self.turn.answers.values(), strict=False):
            if not (only_live and answer.over):
                pane.html(answer_html(answer))


def draw_turns(opened: OpenChat) -> TurnView | None:
    """Every turn of the chat; the view of the live one, if there is one."""
    chat, live = opened.chat, None
    for index, turn in enumerate(chat.turns):
        if chat.begins_context(index):
            st.html(_divider_html(chat, index))
        is_live = opened.run is not None and opened.run.turn is turn
        st.html(f'<div class="ka-question ka-text" data-testid="question">{escape(turn.question)}</div>')
        view = TurnView(turn, f"turn-{index}")
        view.draw()
        if is_live:
            live = view
    return live


def watch(opened: OpenChat, run: Run, view: TurnView, also: Callable[[], None] = lambda: None) -> None:
    """Draws a run until it is over, then the page anew; `also` draws whatever else changes meanwhile.

    A click elsewhere on the page ends this script run but not the answers: the next script run goes on watching.
    When the page itself goes, its workers are stopped. Either reaches this loop as an exception out of `view.draw`.
    """
    try:
        while run.advance():
            view.draw(only_live=True)
            also()
            time.sleep(TICK_S)
    except StopException:
        opened.stop()
        raise
    if opened.run is run:
        opened.run = None
    st.rerun()


def speed_html(turn: Turn) -> str:
    """From measured times only, and only once there are two to compare."""
    answers = [answer for answer in turn.answers.values() if answer.figures.first_token_ms is not None]
    times = [(answer.contender.title, answer.figures.first_token_ms or 0.0) for answer in answers]
    line = speed_line(times)
    if not line:
        return ""
    note = prefix_cache_note([(answer.contender.title, answer.figures) for answer in answers])
    small = f'<small data-testid="prefix-note">{escape(note)}</small>' if note else ""
    first = min(answers, key=lambda answer: answer.figures.first_token_ms or 0.0)
    return (
        f'<div class="ka-speed" data-testid="speed-up" data-winner="{escape(first.contender.name)}">'
        f"{escape(line)}{small}</div>"
    )


def _divider_html(chat: Chat, index: int) -> str:
    num_chunks = len(chat.turns[index].context.chunks)
    chunks = f"{num_chunks} chunk{'' if num_chunks == 1 else 's'}"
    text = f"Conversation over {chunks}" if index == 0 else f"New context: conversation over {chunks}"
    return f'<div class="ka-divider" data-testid="divider">{text}</div>'
