"""The sidebar of Conversations: which modes, what the model knows, and how to ask. Returns the choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import streamlit as st

import state
from chats import OpenChat
from documents_view import draw_remarks
from history import Context
from servers_view import draw_servers
from slot_chat import CACHED, MODES, UNCACHED
from slot_session import SlotSession
from wire import Sampling

KEEP: Final = "session"
NUM_DEFAULT_NOTES = 12
BOTH = "Both"
CHOICES = {BOTH: MODES, CACHED.title: (CACHED,), UNCACHED.title: (UNCACHED,)}


@dataclass(frozen=True)
class Choices:
    """`sessions` are those that answer the next message."""

    context: Context
    sessions: dict[str, SlotSession]
    in_sequence: bool
    is_up: bool
    temperature: float
    max_tokens: int

    def sampling(self, conversation: str) -> Sampling:
        return Sampling(self.temperature, self.max_tokens, user=conversation)


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


def _draw_context(opened: OpenChat) -> Context:
    """The system message that every topic has: a prompt, and text files of the data folder."""
    chunks = state.chunk_files()
    _begin(opened, list(chunks))
    st.subheader("What the model knows")
    st.session_state["notes"] = [name for name in st.session_state["notes"] if name in chunks]
    notes = st.multiselect(
        "Notes",
        list(chunks),
        key="notes",
        persist_state=KEEP,
        placeholder="Pick text files",
        help="They stand in the system message. Another choice of them begins a new conversation.",
    )
    draw_remarks(state.folder_documents())
    system = st.text_area("System prompt", key="conversation-system", height=80, persist_state=KEEP)
    return Context(system.strip(), tuple(chunks[name] for name in notes), state.separator())


def _begin(opened: OpenChat, names: list[str]) -> None:
    """A page's first script run takes up where its chat stands, or with the first notes of the folder."""
    if "notes" in st.session_state:
        return
    turns = opened.chat.turns
    context = turns[-1].context if turns else None
    st.session_state["conversation-system"] = context.system if context else state.folder_documents().system
    st.session_state["notes"] = [c.name for c in context.chunks] if context else names[:NUM_DEFAULT_NOTES]


def _start_new(opened: OpenChat) -> None:
    opened.stop()
    state.new_chat("conversation")
