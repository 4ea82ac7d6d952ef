"""What both chat pages show: which servers are up, checked while nobody clicks; the question box and its stop button.

What was asked waits for the page's run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from html import escape

import streamlit as st

import state
from chat import Chat, Draft
from chat_session import ChatSession
from runs import OpenChat, Run

POLL_S = 4.0
FOLLOW_S = 1.5


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


_ASKED = "asked"
"""A chat's key and the question that waits in it. One is enough: a click on a page is a new one's."""


def waiting_question(chat: Chat) -> str:
    """What was typed or clicked and isn't under way yet; empty if nothing was."""
    key, question = st.session_state.get(_ASKED, ("", ""))
    return str(question) if key == chat.key else ""


def take_asked(opened: OpenChat, make_run: Callable[[], Run], draft: Draft) -> bool:
    """Starts a run of it; False: another page on this chat was first, and it goes on waiting."""
    if begun := opened.begin(make_run, draft):
        del st.session_state[_ASKED]
    return begun


def put_question(chat: Chat, question: str) -> None:
    st.session_state[_ASKED] = (chat.key, question)


def literal(text: str) -> str:
    """For a place that reads Markdown: what a person typed is shown as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!$:~<>|&])", r"\\\1", " ".join(text.split()))


def draw_notices(opened: OpenChat) -> None:
    """Whether the chat lasts, and whether it and its settings are those that were wanted. After the sidebar."""
    if problem := state.chat_file().problem:
        st.warning(problem, icon=":material/save:")
    if state.is_for_lost_link(opened) and not opened.chat.turns:
        st.warning("The chat of this link isn't known here. This is a new one.", icon=":material/link_off:")
    if refused := state.refused_settings(opened):
        named = ", ".join(f"{literal(key)} = {literal(value)}" for key, value in refused.items())
        st.warning(f"The page's address has settings that nothing here takes: {named}", icon=":material/link_off:")


@st.fragment(run_every=FOLLOW_S)
def _follow(opened: OpenChat, drawn: tuple[object, ...]) -> None:
    """Draws the page anew when another page has gone on with the chat."""
    if opened.state != drawn:
        st.rerun()


def draw_question_box(
    opened: OpenChat, placeholder: str, enabled: bool, on_ask: Callable[[], None] = lambda: None
) -> None:
    """`on_ask` is called when something was sent, before the page is drawn anew."""
    _follow(opened, opened.state)
    if waiting := waiting_question(opened.chat):
        st.caption(f"Next in line: {literal(waiting)}")
    with st.bottom:  # said so, for a page whose box Streamlit puts there follows its own end
        if opened.busy:
            st.button("Stop", key="stop", type="primary", on_click=opened.stop)
        # Another box for another size of the letters: Streamlit's measures its height in pixels, once.
        key = "question-big" if state.is_big_screen() else "question"
        st.chat_input(
            "Answering" if opened.busy else placeholder,
            key=key,
            disabled=opened.busy or not enabled,
            on_submit=_take_typed,
            args=[key, opened.chat, on_ask],
        )


def _take_typed(key: str, chat: Chat, on_ask: Callable[[], None]) -> None:
    put_question(chat, (st.session_state[key] or "").strip())
    on_ask()
