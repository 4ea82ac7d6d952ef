"""What outlives a script run: the sessions with the contenders, the chats, and this page's choices.

All pages of the process share the resources; `st.session_state` is one page's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from chat import Chat, Context
from chat_file import ChatFile
from chat_session import ChatSession, SlotSession, StoreSession
from contender_api import BlendOffer, Server, SimLLMOffer
from context_view import TokenCount, count_context
from kvarena.documents import DocumentCache, Documents, TextChunk, load_documents
from kvarena.splitting import Splitter, find_splitter
from runs import ChatStore, OpenChat
from settings import Settings, read_settings
from slots import MODES, SlotChat

REFRESH_AGE_S = 3.0
FORETELL_WAIT_S = 0.3
"""How long a page waits to hear where a message would go."""
_LOST = "lost-link"
_LINKED = "linked-settings"
_REFUSED = "refused-settings"
_CHOSEN = "chosen-links"
BIG_SCREEN = "big-screen"
NO_SETTINGS = ("chat", "conversation", BIG_SCREEN)
OF_MEASURE = "measure"
"""How the keys of Measure's controls begin."""
OF_BLEND = ("policy", "has-max-ttft", "max-ttft-ms")
OF_SIMLLM = ("mode", "similarity-threshold")


@dataclass(frozen=True)
class UnknownLink:
    """A choice in the page's address that doesn't exist here; `instead` is what was shown."""

    label: str
    linked: str
    instead: str = ""


def linked(key: str) -> dict[str, Any]:
    """For a control whose value outlives a look at another page, and is in the page's address under this name."""
    return {"key": key, "persist_state": "session", "bind": "query-params"}


def is_big_screen() -> bool:
    """Works before its switch is drawn, which is the last thing that a script run does."""
    return bool(st.session_state.get(BIG_SCREEN, st.query_params.get(BIG_SCREEN) == "true"))


@st.cache_resource(show_spinner=False)
def page_settings() -> Settings:
    return read_settings(os.environ)


@st.cache_resource(show_spinner=False)
def chat_sessions() -> dict[str, ChatSession]:
    """One per contender, open for as long as the page's process lives."""
    settings = page_settings()
    return {
        contender.name: ChatSession(contender, settings.api_key, settings.timeout_s)
        for contender in settings.contenders
    }


@st.cache_resource(show_spinner=False)
def slot_sessions() -> dict[str, SlotSession]:
    """Two for the contender with KV slots, with and without using them; none if there is no such contender."""
    settings = page_settings()
    server = next((contender for contender in settings.contenders if contender.report == "slots"), None)
    if server is None:
        return {}
    return {
        mode.name: SlotSession(mode.of(server), mode.use_cache, settings.api_key, settings.timeout_s) for mode in MODES
    }


@st.cache_resource(show_spinner=False)
def store_sessions() -> tuple[StoreSession, ...]:
    """One per LMCache server."""
    return tuple(map(StoreSession, page_settings().services))


@st.cache_resource(show_spinner=False)
def chat_file() -> ChatFile:
    return ChatFile(page_settings().home / "chats.db")


@st.cache_resource(show_spinner=False)
def chat_store(page: str = "chat") -> ChatStore:
    """The arena's (`chat`) or that of the conversations (`conversation`)."""
    return ChatStore(kind=SlotChat if page == "conversation" else Chat, file=chat_file())


@st.cache_resource(show_spinner=False)
def _document_cache() -> DocumentCache:
    return {}


def splitter() -> Splitter:
    """Splits as `kvarena warm` does. The tokenizer may come later, with the download of a hub model."""
    settings = page_settings()
    return find_splitter(settings.tokenizer, settings.chunk_tokens)


def choose_chunks(names: Sequence[str]) -> None:
    """Sets the arena's chunks and their order; only before its sidebar is drawn."""
    st.session_state["chunks"] = list(names)
    st.session_state["order"] = st.session_state["dealt"] = list(names)


def read_folder() -> Documents:
    """The data folder's documents; only changed files are read and split again."""
    return load_documents(page_settings().data_dir, splitter(), _document_cache())


@st.cache_data(ttl=3, show_spinner="Reading the documents")
def folder_documents() -> Documents:
    return read_folder()


def chunk_files() -> dict[str, TextChunk]:
    """The data folder's chunks by name."""
    return {chunk.name: chunk for chunk in folder_documents().chunks}


def _server_and_model(session: ChatSession) -> tuple[str, str]:
    return session.contender.url, session.server.model if session.server else ""


@st.cache_data(max_entries=256, show_spinner=False, hash_funcs={ChatSession: _server_and_model})
def token_count(session: ChatSession, context: Context) -> TokenCount:
    """See `count_context`; cached while the same server serves the same model."""
    return count_context(session, context)


@st.cache_data(max_entries=64, show_spinner="Reading the prompt's tokens", hash_funcs={ChatSession: _server_and_model})
def prompt_tokens(session: ChatSession, messages: list[dict[str, str]]) -> list[str]:
    """The texts of a prompt's tokens, cached like `token_count`. Raises `ContenderError`."""
    return session.prompt_tokens(messages)


def refresh_servers(sessions: Mapping[str, ChatSession]) -> None:
    """Asks all of them at once what they are, unless that was a moment ago."""
    now_s = time.monotonic()
    stale = [s for s in sessions.values() if now_s - s.refreshed_s > REFRESH_AGE_S]
    wait([session.refresh() for session in stale])


def servers_seen(sessions: Mapping[str, ChatSession]) -> tuple[tuple[str, str, Server | None], ...]:
    """What the page draws of the servers: it is redrawn when this changes."""
    return tuple((name, s.problem, s.server) for name, s in sessions.items())


def blend_offer() -> BlendOffer | None:
    """The first blending contender's; the last known one if it is down."""
    return next((server.blend for server in _known_servers() if server.blend), None)


def blending_session() -> ChatSession | None:
    """The first contender whose chunk cache can be filled."""
    found = (s for s in chat_sessions().values() if s.server and s.server.blend and s.server.blend.policy)
    return next(found, None)


def simllm_offer() -> SimLLMOffer | None:
    """See `blend_offer`, for the first contender that looks for similar prompts."""
    return next((server.simllm for server in _known_servers() if server.simllm), None)


def _known_servers() -> list[Server]:
    return [session.server for session in chat_sessions().values() if session.server]


def separator() -> str:
    """The same for every contender, so that all get the same prompt."""
    offer = blend_offer()
    return offer.separator if offer else page_settings().separator


def open_chat(page: str = "chat") -> OpenChat:
    """The chat in the page's address, else the one open before another page was, else a new one."""
    st.session_state.setdefault(_LINKED, dict(st.query_params))
    linked = st.query_params.get(page, "")
    if opened := chat_store(page).get(linked or st.session_state.get(page, "")):
        return _remember(opened, page)
    opened = new_chat(page)
    if linked:
        st.session_state[_LOST] = opened.chat.key
    return opened


def is_for_lost_link(opened: OpenChat) -> bool:
    """Whether this chat is new because the one in the page's address isn't known."""
    return bool(st.session_state.get(_LOST) == opened.chat.key)


def new_chat(page: str = "chat") -> OpenChat:
    return _remember(chat_store(page).new(), page)


def choose_linked(key: str, choices: Collection[str], label: str) -> None:
    """Before a choice is drawn for the first time: takes it from the page's address, if it is one of `choices`."""
    linked = st.query_params.get(key)
    if linked is None or key in st.session_state:
        return
    if linked in choices:
        st.session_state[key] = linked
    else:
        _unknown()[key] = UnknownLink(label, linked)


def link(key: str, chosen: str) -> None:
    """Puts a choice into the page's address, for a reload, with the next `send_links`. The next choice forgets an
    unknown one.
    """
    if (unknown := _unknown().get(key)) and unknown.instead not in ("", chosen):
        del _unknown()[key]
    elif unknown:
        _unknown()[key] = replace(unknown, instead=chosen)
    st.session_state.setdefault(_CHOSEN, {})[key] = chosen


def send_links() -> None:
    """All choices of this script run at once, since each change of the address is an entry in the browser's history."""
    chosen: dict[str, str] = st.session_state.pop(_CHOSEN, {})
    if any(st.query_params.get(key) != value for key, value in chosen.items()):
        st.query_params.update(chosen)


def unknown_links() -> list[UnknownLink]:
    return list(_unknown().values())


def _unknown() -> dict[str, UnknownLink]:
    found: dict[str, UnknownLink] = st.session_state.setdefault("unknown-links", {})
    return found


def refused_settings(opened: OpenChat) -> dict[str, str]:
    """What the page's address set when it was opened and no control has taken. Call once the controls are drawn.

    Only for the chat that it was opened with, until something is asked there. A server that comes up later may bring a
    control that takes its setting.
    """
    if _REFUSED not in st.session_state:
        linked: dict[str, str] = st.session_state.get(_LINKED, {})
        settings = {
            key: value for key, value in linked.items() if key not in NO_SETTINGS and not key.startswith(OF_MEASURE)
        }
        st.session_state[_REFUSED] = settings, opened.chat.key, len(opened.chat.turns)
    settings, *asked_of = st.session_state[_REFUSED]
    if asked_of != [opened.chat.key, len(opened.chat.turns)]:
        return {}
    left = {key: value for key, value in settings.items() if not _is_taken(key, value)}
    st.session_state[_REFUSED] = left, *asked_of
    return {key: value for key, value in left.items() if _is_drawn_by_now(key)}


def _is_drawn_by_now(key: str) -> bool:
    """Whether a control with this key would be on the page, if there were one."""
    if key.startswith(OF_BLEND):
        is_offered = blend_offer() is not None
    elif key in OF_SIMLLM:
        is_offered = simllm_offer() is not None
    else:
        return True
    return is_offered or all(session.server for session in chat_sessions().values())


def _is_taken(key: str, value: str) -> bool:
    """Streamlit drops a value from the address if it is the control's default or not one of its values."""
    held = st.session_state.get(key)
    if isinstance(held, int | float) and not isinstance(held, bool):
        try:
            return math.isclose(float(value), held)
        except ValueError:
            return False
    return str(held).lower() == value.lower()


def _remember(opened: OpenChat, page: str) -> OpenChat:
    """In the address, for a reload; and in the session, since leaving a page clears the address."""
    st.query_params[page] = st.session_state[page] = opened.chat.key
    return opened
