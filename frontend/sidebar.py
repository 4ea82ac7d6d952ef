"""The sidebars of Arena and of Conversations: they return the choices.

Arena: which servers, which chunks in which order, and how to ask. Conversations: which modes, what the model knows, and
how to ask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st
from streamlit_sortables import sort_items  # type: ignore[import-untyped]

import state
from chat import Context, Draft
from chat_session import ChatSession, SlotSession
from chat_view import draw_servers
from contender_api import MAX_TTFT_MS, POLICY, BlendOffer, Parameter, Sampling
from documents_view import (
    bring_back,
    draw_new_in_folder,
    draw_remarks,
    draw_uploads,
    kept_documents,
    loaded_chunks,
    uploads,
    watch_folder,
)
from examples import opening_chunks
from kvarena.documents import Document, TextChunk
from runs import OpenChat
from settings import Contender
from slots import CACHED, MODES, UNCACHED

NUM_DEFAULT_CHUNKS = 6
DEFAULT_MAX_TTFT_MS = 500.0
ORIGIN = "CacheBlend"
"""The method that every blend is named after; one policy is its own."""
SORTABLE_STYLE = """
:root { color-scheme: light dark; }
.sortable-component.vertical .sortable-container, .sortable-container-body { padding: 0;
  background: light-dark(#f3f5f9, #1a202b); }
.sortable-component .sortable-item, .sortable-component .sortable-item:hover { border-radius: 6px; margin: 0 0 4px;
  color: light-dark(#172033, #e6eaf2); background: light-dark(#fff, #11151d);
  border: 1px solid light-dark(#c9d3e3, #343d4d); padding: 4px 10px; text-align: left; height: auto;
  font-family: "Source Sans", "Source Sans Pro", sans-serif; font-size: 13px; }
"""
LARGE_SORTABLE_STYLE = SORTABLE_STYLE.replace("13px", "24px")  # it is in a document of its own


@dataclass(frozen=True)
class ArenaChoices:
    context: Context
    sampling: Sampling
    sessions: dict[str, ChatSession]
    in_sequence: bool
    blind: bool
    draft: Draft


def draw_arena_sidebar(opened: OpenChat) -> ArenaChoices:
    begin_arena(opened)
    chunks = loaded_chunks()
    with st.sidebar:
        st.button("New chat", key="new-chat", width="stretch", on_click=_start_new_chat, args=[opened, "chat"])
        sessions, in_sequence = _draw_contenders(opened.busy)
        blind = st.toggle(
            "Blind",
            **state.linked("blind"),
            help="Shuffles the answers and hides who gave them, and all figures, until you have voted.",
        )
        context = _draw_arena_context(chunks, opened.busy)
        sampling = _draw_sampling()
    controls = _controls(ARENA_CONTROLS, OF_ANY_CONTENDER)
    draft = Draft(context, controls, kept_documents(uploads().values()))
    _keep_draft(opened, draft)
    return ArenaChoices(context, sampling, sessions, in_sequence, blind, draft)


ARENA_CONTROLS = (
    POLICY,
    "has-max-ttft",
    "max-ttft-ms",
    "mode",
    "similarity-threshold",
    "temperature",
    "max-tokens",
    "ignore-eos",
    "probabilities",
    "in-sequence",
    "blind",
    "fill-at-once",
)
CONVERSATION_CONTROLS = (
    "modes",
    "conversation-temperature",
    "conversation-max-tokens",
    "conversation-in-sequence",
)


OF_ANY_CONTENDER = ("run-", f"{POLICY}-")
"""How the keys of the arena's other controls begin."""


def _controls(names: Collection[str], beginnings: tuple[str, ...] = ()) -> dict[str, Any]:
    """Their current values."""
    keys = map(str, st.session_state)
    return {key: st.session_state[key] for key in keys if key in names or key.startswith(beginnings)}


def _keep_draft(opened: OpenChat, draft: Draft) -> None:
    """For a reload. A chat in which nobody has set or asked anything isn't written to the file, and a page on which
    nobody has set anything leaves another's draft alone.
    """
    key = f"drawn-{type(opened.chat).__name__}"
    chat_key, drawn = st.session_state.get(key, (opened.chat.key, draft))
    if chat_key != opened.chat.key:
        opened.chat.draft = opened.chat.draft or draft
    elif is_set_otherwise(drawn, draft):
        opened.change(draft)
    st.session_state[key] = opened.chat.key, draft


def is_set_otherwise(before: Draft, now: Draft) -> bool:
    """Whether a person changed something. The chunks' texts, the separator, and which controls exist change by
    themselves, when a file is edited or a server comes up.
    """
    known = before.controls.keys() & now.controls.keys()
    return _set_context(before) != _set_context(now) or any(before.controls[k] != now.controls[k] for k in known)


def _set_context(draft: Draft) -> tuple[object, ...]:
    context = draft.context
    return context.system, context.notes, [chunk.name for chunk in context.chunks], draft.documents


def begin_arena(opened: OpenChat) -> None:
    """A page's first script run continues its chat's draft; a new chat opens with the folder's examples."""
    if "chunks" in st.session_state:
        return
    if draft := opened.chat.draft:
        _take_up(draft)
        return
    names = list(state.chunk_files())
    st.session_state["system-prompt"] = state.folder_documents().system
    state.choose_chunks(opening_chunks(state.page_settings().data_dir, names) or names[:NUM_DEFAULT_CHUNKS])


def _take_up(draft: Draft) -> None:
    """Texts that neither the folder nor the chat's documents have are added as if they had been pasted."""
    _set_controls(draft.controls)
    st.session_state["system-prompt"] = draft.context.system
    state.choose_chunks([chunk.name for chunk in draft.context.chunks])
    bring_back(draft.documents)
    known = loaded_chunks()
    lost = [chunk for chunk in draft.context.chunks if chunk.name not in known]
    bring_back(Document(f"{chunk.name}.txt", (chunk.text,)) for chunk in lost)


def _set_controls(controls: Mapping[str, Any]) -> None:
    """Except those in the page's address."""
    told = {key: value for key, value in controls.items() if value is not None and key not in st.query_params}
    st.session_state.update(told)


def _start_new_chat(opened: OpenChat, page: str) -> None:
    opened.leave(str(st.session_state.get("watcher", "")))  # another tab may be watching what is under way
    state.new_chat(page)


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
            **state.linked(f"run-{name}"),
            help=_explained(session.contender),
        )
    }
    in_sequence = st.toggle(
        "One after the other",
        **state.linked("in-sequence"),
        help="Off: all answer at the same time. On: each is asked when the one before is done, so that they don't slow "
        "each other down on a shared machine.",
    )
    return chosen, in_sequence


def _explained(contender: Contender) -> str | None:
    kind = "approximate" if contender.approximate else "exact"
    return f"{contender.explanation} Its answers are {kind}." if contender.explanation else None


def _draw_arena_context(chunks: dict[str, TextChunk], busy: bool) -> Context:
    st.subheader("Context")
    st.session_state["chunks"] = [name for name in _in_order(st.session_state["chunks"]) if name in chunks]
    picked = st.multiselect(
        "Chunks",
        list(chunks),
        key="chunks",
        persist_state="session",
        placeholder="Pick chunks",
        help=f"Documents in {state.page_settings().data_dir} and your own. Long ones are split into numbered chunks. "
        "New files appear by themselves.",
    )
    draw_remarks(state.folder_documents())
    draw_new_in_folder(busy)
    watch_folder(state.folder_documents(), busy)
    order = _draw_order(picked)
    draw_uploads(busy, order)
    system = st.text_area("System prompt", key="system-prompt", height=80, persist_state="session")
    return Context(system.strip(), tuple(chunks[name] for name in order), state.separator())


def _in_order(picked: list[str]) -> list[str]:
    """As the chunks were dragged since the page was drawn, if they were."""
    containers = st.session_state.get(_order_key())
    if not containers or (order := containers[0]["items"]) == st.session_state["order"]:
        return picked
    st.session_state["order"] = order
    return sorted(picked, key=lambda name: order.index(name) if name in order else len(order))


def _draw_order(picked: list[str]) -> list[str]:
    """By hand. `dealt` is the order that the widget was given, `order` what was made of it."""
    if picked != st.session_state["order"] or _order_key() not in st.session_state:
        st.session_state["order"] = st.session_state["dealt"] = picked
    if len(picked) < 2:
        return picked
    st.caption("Order: drag, or Space and the arrow keys")
    style = LARGE_SORTABLE_STYLE if state.is_big_screen() else SORTABLE_STYLE
    with st.container(key="chunk-order"):
        order: list[str] = sort_items(
            st.session_state["dealt"], direction="vertical", custom_style=style, key=_order_key()
        )
    st.session_state["order"] = order
    return order


def _order_key() -> str:
    return "order-" + hashlib.sha256("\0".join(st.session_state["dealt"]).encode()).hexdigest()[:16]


def _draw_sampling() -> Sampling:
    recomputing = _draw_blend()
    mode, similarity_threshold = _draw_simllm()
    st.subheader("Answer")
    temperature = st.slider("Temperature", 0.0, 2.0, 0.0, 0.1, **state.linked("temperature"))
    max_tokens = st.number_input("Max tokens", 1, 32768, 128, **state.linked("max-tokens"))
    ignore_eos = st.toggle(
        "Always max tokens",
        **state.linked("ignore-eos"),
        help="Keep generating after the end of the answer (`ignore_eos`). Both sides then have the same length, "
        "which makes tokens per second comparable.",
    )
    probabilities = st.toggle(
        "Show probabilities",
        **state.linked("probabilities"),
        help="Colours each token of the answers by its probability; point at one for the five likeliest at its place. "
        "The prompt's recomputed tokens then say by what score the policy chose them, and which chunk they lean on. "
        "That takes a blend some time before its first token: turn it off to compare times.",
    )
    return Sampling(
        temperature,
        int(max_tokens),
        ignore_eos,
        recomputing,
        mode,
        similarity_threshold,
        probabilities=probabilities,
    )


def _draw_blend() -> dict[str, Any]:
    """The policy and its parameters, as the first contender that blends describes them; the first parameter is always
    visible. Empty if nobody blends.
    """
    offer = state.blend_offer()
    if not offer or not offer.policy:
        return {}
    st.subheader("Reuse")
    policy = _draw_parameter(offer.policy)
    if explanation := offer.policy.explanations.get(policy):
        origin = next((name for name, text in offer.policy.explanations.items() if ORIGIN in text), policy)
        st.caption(explanation if policy == origin else f"{explanation} {ORIGIN}'s own policy is {origin}.")
    timed = _draw_max_ttft(offer) if policy in offer.timed_policies else {}
    parameters = offer.parameters_of(policy, within_time=bool(timed))
    chosen = {one.name: _draw_parameter(one) for one in parameters[:1]}
    if parameters[1:]:
        with st.expander("More"):
            chosen |= {one.name: _draw_parameter(one) for one in parameters[1:]}
    return {POLICY: policy, **chosen, **timed}


def _draw_max_ttft(offer: BlendOffer) -> dict[str, float]:
    """The time that replaces the ratio, if wanted."""
    if not st.toggle(
        "Keep to a time",
        offer.max_ttft_ms is not None,
        **state.linked("has-max-ttft"),
        help="Recompute as many tokens as fit into this time to first token. The server learns from earlier blends "
        "what a token costs.",
    ):
        return {}
    default_ms = offer.max_ttft_ms or DEFAULT_MAX_TTFT_MS
    time_ms = st.number_input(
        "Time to first token (ms)", 1.0, None, default_ms, 50.0, "%g", **state.linked("max-ttft-ms")
    )
    return {MAX_TTFT_MS: time_ms}


def parameter_key(name: str) -> str:
    return name if name == POLICY else f"{POLICY}-{name}"


def _draw_parameter(one: Parameter) -> Any:
    """A slider for a share, a field for a number, a box for a word. A chat's value that this server doesn't take is
    forgotten.
    """
    key = parameter_key(one.name)
    if key in st.session_state and not one.takes(st.session_state[key]):
        del st.session_state[key]
    own: dict[str, Any] = {"help": one.help, **state.linked(key)}
    if one.choices:
        index = one.choices.index(one.default) if one.default in one.choices else 0
        return st.selectbox(one.label, one.choices, index=index, **own)
    if one.kind == "integer":
        return st.number_input(one.label, int(one.at_least), int(one.at_most), int(one.default), 1, **own)
    low, high = float(one.at_least), float(one.at_most)
    return st.slider(one.label, low, high, float(one.default), (high - low) / 100, **own)


def _draw_simllm() -> tuple[str | None, float | None]:
    """Mode and similarity threshold, if a contender has them."""
    offer = state.simllm_offer()
    if not offer:
        return None, None
    st.subheader("Similar prompts")
    if st.session_state.get("mode") not in (None, *offer.modes):
        del st.session_state["mode"]
    mode = st.selectbox(
        "Mode",
        offer.modes,
        index=offer.modes.index(offer.mode),
        **state.linked("mode"),
        help="What is reused from a similar earlier prompt. `aligned`: the KV of all layers, where both prompts have "
        "the same text. `top_layer`: the KV of the last layer, as in the Sim-LLM paper; `sandwich`: the same, with the "
        "first and the last two layers run. Both are fast, but give wrong answers on a model that wasn't trained for "
        "it.",
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
        **state.linked("similarity-threshold"),
        help="Minimum cosine similarity between the mean embeddings of two prompts. Prompts over the same long texts "
        "are all close to 1.",
    )
    return mode, similarity_threshold


BOTH = "Both"
MODE_CHOICES = {BOTH: MODES, CACHED.title: (CACHED,), UNCACHED.title: (UNCACHED,)}


@dataclass(frozen=True)
class ConversationChoices:
    """`sessions` answer the next message."""

    context: Context
    sessions: dict[str, SlotSession]
    in_sequence: bool
    is_up: bool
    temperature: float
    max_tokens: int
    draft: Draft

    def sampling(self, conversation: str, topic: str) -> Sampling:
        notes = self.context.notes
        return Sampling(self.temperature, self.max_tokens, conversation=conversation, notes=notes, topic=topic)


def draw_conversation_sidebar(opened: OpenChat) -> ConversationChoices:
    _begin_conversation(opened)
    with st.sidebar:
        st.button(
            "New conversation",
            key="new-chat",
            width="stretch",
            on_click=_start_new_chat,
            args=[opened, "conversation"],
        )
        sessions = state.slot_sessions()
        server = {name: session for name, session in sessions.items() if name == CACHED.name}
        if server:
            draw_servers(server, opened.busy)
        modes, in_sequence = _draw_modes()
        context = _draw_conversation_context()
        st.subheader("Answer")
        temperature = st.slider(
            "Temperature", 0.0, 2.0, 0.0, 0.1, key="conversation-temperature", persist_state="session"
        )
        max_tokens = st.number_input(
            "Max tokens", 1, 32768, 128, key="conversation-max-tokens", persist_state="session"
        )
    draft = Draft(context, _controls(CONVERSATION_CONTROLS))
    _keep_draft(opened, draft)
    return ConversationChoices(
        context,
        {name: sessions[name] for name in modes if name in sessions},
        in_sequence,
        bool(server) and all(session.up for session in server.values()),
        temperature,
        int(max_tokens),
        draft,
    )


def _draw_modes() -> tuple[list[str], bool]:
    chosen = st.segmented_control(
        "Answer each message",
        list(MODE_CHOICES),
        default=BOTH,
        required=True,
        key="modes",
        persist_state="session",
        help="With slots, a follow-up prefills only its own tokens. Without slots, it prefills the topic's whole "
        "history. Both get the same messages.",
    )
    in_sequence = st.toggle(
        "One after the other",
        value=True,
        key="conversation-in-sequence",
        persist_state="session",
        help="Off: both run at the same time, in one batch, and slow each other down.",
    )
    return [mode.name for mode in MODE_CHOICES[chosen or BOTH]], in_sequence


def _draw_conversation_context() -> Context:
    """What every topic begins with: the system prompt, and notes that the server chooses for it."""
    st.subheader("What the model knows")
    notes = st.toggle(
        "Notes for each topic",
        key="conversation-notes",
        persist_state="session",
        help="The server puts the notes from the data folder that fit a topic's first message into the system message, "
        "and adds to later messages what they need beyond that. Changing this starts a new conversation.",
    )
    draw_remarks(state.folder_documents())
    system = st.text_area("System prompt", key="conversation-system", height=80, persist_state="session")
    return Context(system.strip(), notes=notes)


def _begin_conversation(opened: OpenChat) -> None:
    """A page's first script run continues its chat's draft, or begins with the folder's system prompt and notes."""
    if "conversation-notes" in st.session_state:
        return
    draft = opened.chat.draft or Draft(Context(state.folder_documents().system, notes=True))
    st.session_state["conversation-system"] = draft.context.system
    st.session_state["conversation-notes"] = draft.context.notes
    _set_controls(draft.controls)
