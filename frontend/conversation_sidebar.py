"""The sidebar of Conversations: which modes, what the model knows, and how to ask. Returns the choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import streamlit as st

import state
from chats import OpenChat
from documents_view import draw_remarks
from servers_view import draw_servers
from slot_chat import CACHED, MODES, UNCACHED, SlotContext
from slot_session import SlotSession
from wire import Sampling

KEEP: Final = "session"
BOTH = "Both"
CHOICES = {BOTH: MODES, CACHED.title: (CACHED,), UNCACHED.title: (UNCACHED,)}


@dataclass(frozen=True)
class Choices:
    """`sessions` are those that answer the next message."""

    context: SlotContext
    sessions: dict[str, SlotSession]
    in_sequence: bool
    is_up: bool
    temperature: float
    max_tokens: int

    def sampling(self, conversation: str) -> Sampling:
        return Sampling(self.temperature, self.max_tokens, user=conversation, notes=self.context.notes)


def draw_sidebar(opened: OpenChat) -> Choices:
    with st.sidebar:
        st.button("New conversation", key="new-chat", width="stretch", on_click=_start_new, args=[opened])
        sessions = state.slot_sessions()
        server = {name: session for name, session in sessions.items() if name == CACHED.name}
        if server:
            draw_servers(server, opened.busy)
        modes, in_sequence = _draw_modes()
        context = _draw_context(opened)
        st.subheader("Answer")
        temperature = st.slider("Temperature", 0.0, 2.0, 0.0, 0.1, key="conversation-temperature", persist_state=KEEP)
        max_tokens = st.number_input("Max tokens", 1, 32768, 128, key="conversation-max-tokens", persist_state=KEEP)
    return Choices(
        context,
        {name: sessions[name] for name in modes if name in sessions},
        in_sequence,
        bool(server) and all(session.up for session in server.values()),
        temperature,
        int(max_tokens),
    )


def _draw_modes() -> tuple[list[str], bool]:
    chosen = st.segmented_control(
        "Answer each message",
        list(CHOICES),
        default=BOTH,
        required=True,
        key="modes",
        persist_state=KEEP,
        help="With slots a follow-up prefills its own tokens only; without, the topic's whole history. Both get the "
        "same messages.",
    )
    in_sequence = st.toggle(
        "One after the other",
        value=True,
        key="conversation-in-sequence",
        persist_state=KEEP,
        help="Off: both at the same time, in one batch, so that each slows the other down.",
    )
    return [mode.name for mode in CHOICES[chosen or BOTH]], in_sequence


def _draw_context(opened: OpenChat) -> SlotContext:
    """What every topic begins with: the system prompt, and notes that the server chooses for it."""
    _begin(opened)
    st.subheader("What the model knows")
    notes = st.toggle(
        "Notes for each topic",
        key="conversation-notes",
        persist_state=KEEP,
        help="The server takes those of the data folder that fit a topic's first message into its system message, and "
        "adds to a later message what it needs beyond them. Another choice begins a new conversation.",
    )
    draw_remarks(state.folder_documents())
    system = st.text_area("System prompt", key="conversation-system", height=80, persist_state=KEEP)
    return SlotContext(system.strip(), notes=notes)


def _begin(opened: OpenChat) -> None:
    """A page's first script run takes up where its chat stands, or with the folder's system prompt and notes."""
    if "conversation-notes" in st.session_state:
        return
    turns = opened.chat.turns
    context = turns[-1].context if turns else None
    st.session_state["conversation-system"] = context.system if context else state.folder_documents().system
    st.session_state["conversation-notes"] = context.notes if isinstance(context, SlotContext) else True


def _start_new(opened: OpenChat) -> None:
    opened.stop()
    state.new_chat("conversation")
