"""Which servers are up: drawn, and looked after while nobody clicks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import streamlit as st

import state
from chat_session import ChatSession

POLL_S = 4.0


def draw_servers(sessions: Mapping[str, ChatSession], busy: bool) -> None:
    """Asks the servers first, unless an answer is under way."""
    if not busy:
        state.refresh_servers(sessions)
    _draw(sessions, state.servers_seen(sessions), busy)


@st.fragment(run_every=POLL_S)
def _draw(sessions: Mapping[str, ChatSession], drawn: tuple[object, ...], busy: bool) -> None:
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
