"""The sidebars of Arena and of Conversations. They return the choices and ask nobody.

Arena: which servers, which chunks in which order, and how to ask. Conversations: which modes, what the model knows,
and how to ask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import streamlit as st
from streamlit_sortables import sort_items  # type: ignore[import-untyped]

import state
from chat import Context
from chat_session import ChatSession, SlotSession
from contender_api import MAX_TTFT_MS, POLICY, BlendOffer, Parameter, Sampling
from documents_view import draw_remarks, draw_uploads
from examples import opening_chunks
from kvarena.documents import TextChunk
from question_box import draw_servers
from runs import OpenChat
from settings import Contender
from slots import CACHED, MODES, UNCACHED, SlotContext

NUM_DEFAULT_CHUNKS = 6
DEFAULT_MAX_TTFT_MS = 500.0
KEEP: Final = "session"  # what a widget holds outlives a look at another page
SORTABLE_STYLE = """
.sortable-component.vertical .sortable-container { padding: 0; background: #f3f5f9; }
.sortable-container-body { padding: 0; background: #f3f5f9; }
.sortable-component .sortable-item, .sortable-component .sortable-item:hover { background: #fff; color: #172033;
  border: 1px solid #c9d3e3; border-radius: 6px; margin: 0 0 4px; padding: 4px 10px; text-align: left;
  font-family: "Source Sans", "Source Sans Pro", sans-serif; font-size: 13px; height: auto; }
"""


@dataclass(frozen=True)
class ArenaChoices:
    context: Context
    sampling: Sampling
    sessions: dict[str, ChatSession]
    in_sequence: bool


def draw_arena_sidebar(opened: OpenChat) -> ArenaChoices:
    uploaded = state.uploaded_chunks().values()
    chunks = state.chunk_files() | {chunk.name: chunk for named in uploaded for chunk in named}
    _begin_arena(opened, list(chunks))
    with st.sidebar:
        st.button("New chat", key="new-chat", width="stretch", on_click=_start_new_chat, args=[opened])
        sessions, in_sequence = _draw_contenders(opened.busy)
        context = _draw_arena_context(chunks, opened.busy)
        sampling = _draw_sampling()
    return ArenaChoices(context, sampling, sessions, in_sequence)


def choose_chunks(names: Sequence[str]) -> None:
    """Sets the selection and its order; only before the sidebar is drawn."""
    st.session_state["chunks"] = list(names)
    st.session_state["order"] = st.session_state["dealt"] = list(names)


def _begin_arena(opened: OpenChat, names: list[str]) -> None:
    """A page's first script run takes up where its chat stands; a new chat opens on the folder's examples."""
    if "chunks" in st.session_state:
        return
    turns = opened.chat.turns
    context = turns[-1].context if turns else None
    before = [chunk.name for chunk in context.chunks if chunk.name in names] if context else None
    st.session_state["system-prompt"] = context.system if context else state.folder_documents().system
    opening = opening_chunks(state.page_settings().data_dir, names) or names[:NUM_DEFAULT_CHUNKS]
    choose_chunks(opening if before is None else before)


def _start_new_chat(opened: OpenChat) -> None:
    opened.stop()
    state.new_chat()


def _draw_contenders(busy: bool) -> tuple[dict[str, ChatSession], bool]:
    st.subheader("Contenders")
    sessions = state.chat_sessions()
    draw_servers(sessions, busy)
    chosen = {
        name: session
        for name, session in sessions.items()
        if st.checkbox(
            session.contender.title,
            value=True,
            key=f"run-{name}",
            persist_state=KEEP,
            help=_explained(session.contender),
        )
    }
    in_sequence = st.toggle(
        "One after the other",
        key="in-sequence",
        persist_state=KEEP,
        help="Off: both answer at the same time. On: the second is asked when the first is done, so that they don't "
        "slow each other down on a shared machine.",
    )
    return chosen, in_sequence


def _explained(contender: Contender) -> str | None:
    kind = "approximate" if contender.approximate else "exact"
    return f"{contender.explanation} Its answers are {kind}." if contender.explanation else None


def _draw_arena_context(chunks: dict[str, TextChunk], busy: bool) -> Context:
    st.subheader("Context")
    st.session_state["chunks"] = [n for n in st.session_state["chunks"] if n in chunks]
    picked = st.multiselect(
        "Chunks",
        list(chunks),
        key="chunks",
        persist_state=KEEP,
        placeholder="Pick chunks",
        help=f"Documents in {state.page_settings().data_dir} and your own. Long ones are split into numbered chunks. "
        "New files appear by themselves.",
    )
    draw_remarks(state.folder_documents())
    order = _draw_order(picked)
    draw_uploads(busy, choose_chunks)
    system = st.text_area("System prompt", key="system-prompt", height=80, persist_state=KEEP)
    return Context(system.strip(), tuple(chunks[name] for name in order), state.separator())


def _draw_order(picked: list[str]) -> list[str]:
    """Drag and drop. `dealt` is the order that the widget was given, `order` what was made of it by hand."""
    order: list[str] = st.session_state["order"]
    if set(order) != set(picked):
        order = [name for name in order if name in picked]
        order += [name for name in picked if name not in order]
        st.session_state["order"] = st.session_state["dealt"] = order
    if len(order) < 2:
        return order
    st.caption("Order: drag to change it")
    dealt: list[str] = st.session_state["dealt"]
    key = "order-" + hashlib.sha256("\0".join(dealt).encode()).hexdigest()[:16]
    with st.container(key="chunk-order"):
        order = sort_items(dealt, direction="vertical", custom_style=SORTABLE_STYLE, key=key)
    st.session_state["order"] = order
    return order


def _draw_sampling() -> Sampling:
    recomputing = _draw_blend()
    mode, similarity_threshold = _draw_simllm()
    st.subheader("Answer")
    temperature = st.slider("Temperature", 0.0, 2.0, 0.0, 0.1, key="temperature", persist_state=KEEP)
    max_tokens = st.number_input("Max tokens", 1, 32768, 128, key="max-tokens", persist_state=KEEP)
    ignore_eos = st.toggle(
        "Always max tokens",
        key="ignore-eos",
        persist_state=KEEP,
        help="Keep generating after the end of the answer (`ignore_eos`). Both sides then have the same length, "
        "which makes tokens per second comparable.",
    )
    return Sampling(temperature, int(max_tokens), ignore_eos, recomputing, mode, similarity_threshold)


def _draw_blend() -> dict[str, Any]:
    """The policy and its parameters, as the first contender that blends describes them; the first parameter in sight.

    Empty where nobody blends.
    """
    offer = state.blend_offer()
    if not offer or not offer.policy:
        return {}
    st.subheader("Reuse")
    policy = _draw_parameter(offer.policy)
    timed = _draw_max_ttft(offer) if policy in offer.timed_policies else {}
    parameters = offer.parameters_of(policy, within_time=bool(timed))
    chosen = {one.name: _draw_parameter(one) for one in parameters[:1]}
    if parameters[1:]:
        with st.expander("More"):
            chosen |= {one.name: _draw_parameter(one) for one in parameters[1:]}
    return {POLICY: policy, **chosen, **timed}


def _draw_max_ttft(offer: BlendOffer) -> dict[str, float]:
    """The time in place of the ratio, if it is wanted."""
    if not st.toggle(
        "Keep to a time",
        offer.max_ttft_ms is not None,
        key="has-max-ttft",
        persist_state=KEEP,
        help="Recompute as many tokens as fit into this time to first token. The server learns from earlier blends "
        "what a token costs.",
    ):
        return {}
    default_ms = offer.max_ttft_ms or DEFAULT_MAX_TTFT_MS
    time_ms = st.number_input(
        "Time to first token (ms)", 1.0, None, default_ms, 50.0, "%g", key="max-ttft-ms", persist_state=KEEP
    )
    return {MAX_TTFT_MS: time_ms}


def _draw_parameter(one: Parameter) -> Any:
    """A slider for a share, a field for a number of things, a box for a word."""
    own: dict[str, Any] = {
        "key": one.name if one.name == POLICY else f"{POLICY}-{one.name}",
        "help": one.help,
        "persist_state": KEEP,
    }
    if one.choices:
        index = one.choices.index(one.default) if one.default in one.choices else 0
        return st.selectbox(one.label, one.choices, index=index, **own)
    if one.kind == "integer":
        return st.number_input(one.label, int(one.at_least), int(one.at_most), int(one.default), 1, **own)
    low, high = float(one.at_least), float(one.at_most)
    return st.slider(one.label, low, high, float(one.default), (high - low) / 100, **own)


def _draw_simllm() -> tuple[str | None, float | None]:
    """Mode and similarity threshold, where there is a contender for them."""
    offer = state.simllm_offer()
    if not offer:
        return None, None
    st.subheader("Similar prompts")
    mode = st.selectbox(
        "Mode",
        offer.modes,
        index=offer.modes.index(offer.mode),
        key="mode",
        persist_state=KEEP,
        help="What is reused from a similar earlier prompt. `aligned`: the KV of all layers, where both prompts have "
        "the same text. `top_layer`: the KV of the last layer, as in the Sim-LLM paper. That is fast, but gives wrong "
        "answers on a model that wasn't trained for it.",
    )
    if offer.similarity_threshold is None:
        st.caption("The server finds its similarity threshold by itself.")
        return mode, None
    similarity_threshold = st.number_input(
        "Similarity threshold",
        -1.0,
        1.0,
        offer.similarity_threshold,
        0.001,
        format="%.4f",
        key="similarity-threshold",
        persist_state=KEEP,
        help="Minimum cosine similarity between the mean embeddings of two prompts. Prompts over the same long texts "
        "are all close to 1.",
    )
    return mode, similarity_threshold


BOTH = "Both"
MODE_CHOICES = {BOTH: MODES, CACHED.title: (CACHED,), UNCACHED.title: (UNCACHED,)}


@dataclass(frozen=True)
class ConversationChoices:
    """`sessions` are those that answer the next message."""

    context: SlotContext
    sessions: dict[str, SlotSession]
    in_sequence: bool
    is_up: bool
    temperature: float
    max_tokens: int

    def sampling(self, conversation: str) -> Sampling:
        return Sampling(self.temperature, self.max_tokens, user=conversation, notes=self.context.notes)


def draw_conversation_sidebar(opened: OpenChat) -> ConversationChoices:
    with st.sidebar:
        st.button("New conversation", key="new-chat", width="stretch", on_click=_start_new_conversation, args=[opened])
        sessions = state.slot_sessions()
        server = {name: session for name, session in sessions.items() if name == CACHED.name}
        if server:
            draw_servers(server, opened.busy)
        modes, in_sequence = _draw_modes()
        context = _draw_conversation_context(opened)
        st.subheader("Answer")
        temperature = st.slider("Temperature", 0.0, 2.0, 0.0, 0.1, key="conversation-temperature", persist_state=KEEP)
        max_tokens = st.number_input("Max tokens", 1, 32768, 128, key="conversation-max-tokens", persist_state=KEEP)
    return ConversationChoices(
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
        list(MODE_CHOICES),
        default=BOTH,
        required=True,
        key="modes",
        persist_state=KEEP,
        help="With slots, a follow-up prefills only its own tokens. Without slots, it prefills the topic's whole "
        "history. Both get the same messages.",
    )
    in_sequence = st.toggle(
        "One after the other",
        value=True,
        key="conversation-in-sequence",
        persist_state=KEEP,
        help="Off: both run at the same time, in one batch, and slow each other down.",
    )
    return [mode.name for mode in MODE_CHOICES[chosen or BOTH]], in_sequence


def _draw_conversation_context(opened: OpenChat) -> SlotContext:
    """What every topic begins with: the system prompt, and notes that the server chooses for it."""
    _begin_conversation(opened)
    st.subheader("What the model knows")
    notes = st.toggle(
        "Notes for each topic",
        key="conversation-notes",
        persist_state=KEEP,
        help="The server puts the notes from the data folder that fit a topic's first message into the system message, "
        "and adds to later messages what they need beyond that. Changing this starts a new conversation.",
    )
    draw_remarks(state.folder_documents())
    system = st.text_area("System prompt", key="conversation-system", height=80, persist_state=KEEP)
    return SlotContext(system.strip(), notes=notes)


def _begin_conversation(opened: OpenChat) -> None:
    """A page's first script run takes up where its chat stands, or with the folder's system prompt and notes."""
    if "conversation-notes" in st.session_state:
        return
    turns = opened.chat.turns
    context = turns[-1].context if turns else None
    st.session_state["conversation-system"] = context.system if context else state.folder_documents().system
    st.session_state["conversation-notes"] = context.notes if isinstance(context, SlotContext) else True


def _start_new_conversation(opened: OpenChat) -> None:
    opened.stop()
    state.new_chat("conversation")
