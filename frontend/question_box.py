"""Where a question is typed, and the button that stops the one under way. What was asked waits for the page's run."""

from __future__ import annotations

import streamlit as st

from chats import OpenChat


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
