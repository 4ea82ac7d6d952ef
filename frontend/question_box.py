"""What both chat pages show: which servers are up, checked while nobody clicks; the question box and its stop button.

What was asked waits for the page's run.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import streamlit as st

import state
from chat_session import ChatSession
from runs import OpenChat

POLL_S = 4.0


def draw_servers(sessions: Mapping[str, ChatSession], busy: bool) -> None:
    """Asks the servers first, unless an answer is under way."""
    if not busy:
        state.refresh_servers(sessions)
    _draw_live_servers(sessions, state.servers_seen(sessions), busy)


@st.fragment(run_every=POLL_S)
def _draw_live_servers(sessions: Mapping[str, ChatSession], drawn: tuple[object, ...], busy: bool) -> None:
    """Draws the page anew when a server went up or down."""
    if not busy:
        state.refresh_servers(sessions)
        if state.servers_seen(sessions) != drawn:
            st.rerun()
    st.html("".join(_server_html(session) for session in sessions.values()))


def _server_html(session: ChatSession) -> str:
    contender, server = session.contender, session.server
    up = "up" if session.up else "down"
    detail = server.model if session.up and server else session.problem
    if session.up and server and server.max_model_len:
        detail += f", context of {server.max_model_len:,} tokens"
    return (
        f'<div class="ka-server" data-testid="server-{escape(contender.name)}" data-state="{up}"><i></i>'
        f"<div>{escape(contender.title)}: {up}<small>{escape(detail)}</small></div></div>"
    )


def asked_question() -> str:
    """What was typed or clicked since the last call; empty if nothing was."""
    return str(st.session_state.pop("asked", ""))


def put_question(question: str) -> None:
    st.session_state["asked"] = question


def draw_question_box(opened: OpenChat, placeholder: str, enabled: bool) -> None:
    if opened.busy:
        with st.bottom:
            st.button("Stop", key="stop", type="primary", on_click=opened.stop)
    st.chat_input(
        "Answering" if opened.busy else placeholder,
        key="question",
        disabled=opened.busy or not enabled,
        on_submit=_take_typed,
    )


def _take_typed() -> None:
    put_question((st.session_state["question"] or "").strip())
