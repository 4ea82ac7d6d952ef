"""What outlives a script run: the sessions with the contenders, the chats, and what this page has chosen.

Resources are shared by every page of the process; `st.session_state` is this page's alone.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Mapping
from concurrent.futures import wait
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from chat import Chat, Context
from chat_file import ChatFile
from chat_session import ChatSession, SlotSession, StoreSession
from contender_api import BlendOffer, Server, SimLLMOffer
from context_view import TokenCount, count_context
from kvarena.documents import DocumentCache, Documents, TextChunk, load_documents, name_chunks
from kvarena.splitting import Splitter, find_splitter
from runs import ChatStore, OpenChat
from settings import Settings, read_settings
from slots import MODES, SlotChat
from uploads import Upload

REFRESH_AGE_S = 3.0
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
LINKED: Any = {"persist_state": "session", "bind": "query-params"}
"""Of a control whose value outlives a look at another page, and stands in the page's address for a reload."""


@dataclass(frozen=True)
class UnknownLink:
    """A choice that the page's address names and that isn't here; `instead` is what was shown."""

    label: str
    linked: str
    instead: str = ""


def is_big_screen() -> bool:
    """Also before its switch is drawn, which is the last thing that a script run does."""
    return bool(st.session_state.get(BIG_SCREEN, st.query_params.get(BIG_SCREEN) == "true"))


@st.cache_resource(show_spinner=False)
def page_settings() -> Settings:
    return read_settings(os.environ)


@st.cache_resource(show_spinner=False)
def chat_sessions() -> dict[str, ChatSession]:
    """One line per contender, kept open for as long as the page's process lives."""
    settings = page_settings()
    return {
        contender.name: ChatSession(contender, settings.api_key, settings.timeout_s)
        for contender in settings.contenders
    }


@st.cache_resource(show_spinner=False)
def slot_sessions() -> dict[str, SlotSession]:
    """Two lines to the contender with KV slots, one that uses them and one that doesn't; none without such a one."""
    settings = page_settings()
    server = next((contender for contender in settings.contenders if contender.report == "slots"), None)
    if server is None:
        return {}
    return {
        mode.name: SlotSession(mode.of(server), mode.use_cache, settings.api_key, settings.timeout_s) for mode in MODES
    }


@st.cache_resource(show_spinner=False)
def store_sessions() -> tuple[StoreSession, ...]:
    """A line to each LMCache server."""
    return tuple(map(StoreSession, page_settings().services))


@st.cache_resource(show_spinner=False)
def chat_file() -> ChatFile:
    return ChatFile(page_settings().home / "chats.db")


@st.cache_resource(show_spinner=False)
def chat_store(page: str = "chat") -> ChatStore:
    """Of the arena (`chat`) or of the conversations (`conversation`)."""
    return ChatStore(kind=SlotChat if page == "conversation" else Chat, file=chat_file())


@st.cache_resource(show_spinner=False)
def _document_cache() -> DocumentCache:
    return {}


def splitter() -> Splitter:
    """As `kvarena warm` splits; its tokenizer may come later, with the download of a hub model."""
    settings = page_settings()
    return find_splitter(settings.tokenizer, settings.chunk_tokens)


def read_folder() -> Documents:
    """The data folder's documents; only files that have changed are read and split again."""
    return load_documents(page_settings().data_dir, splitter(), _document_cache())


@st.cache_data(ttl=3, show_spinner="Reading the documents")
def folder_documents() -> Documents:
    return read_folder()


def chunk_files() -> dict[str, TextChunk]:
    """The data folder's chunks by name."""
    return {chunk.name: chunk for chunk in folder_documents().chunks}


def uploads() -> dict[str, Upload]:
    """What was dropped on this page, by the key of each; gone with the session."""
    found: dict[str, Upload] = st.session_state.setdefault("uploads", {})
    return found


def uploaded_chunks() -> dict[str, tuple[TextChunk, ...]]:
    """The chunks of each upload by its key, under names that no chunk of the data folder has."""
    documents = [upload.document for upload in uploads().values()]
    return dict(zip(uploads(), name_chunks(documents, chunk_files().keys()), strict=True))


def _server_and_model(session: ChatSession) -> tuple[str, str]:
    return session.contender.url, session.server.model if session.server else ""


@st.cache_data(max_entries=256, show_spinner=False, hash_funcs={ChatSession: _server_and_model})
def token_count(session: ChatSession, context: Context) -> TokenCount:
    """As `count_context`, kept for as long as the same server serves the same model."""
    return count_context(session, context)


@st.cache_data(max_entries=64, show_spinner="Reading the prompt's tokens", hash_funcs={ChatSession: _server_and_model})
def prompt_tokens(session: ChatSession, messages: list[dict[str, str]]) -> list[str]:
    """The texts of a prompt's tokens, kept as `token_count` is. Raises `ContenderError`."""
    return session.prompt_tokens(messages)


def refresh_servers(sessions: Mapping[str, ChatSession]) -> None:
    """Asks all of them at once what they are, unless that is known from a moment ago."""
    now_s = time.monotonic()
    stale = [s for s in sessions.values() if now_s - s.refreshed_s > REFRESH_AGE_S]
    wait([session.refresh() for session in stale])


def servers_seen(sessions: Mapping[str, ChatSession]) -> tuple[tuple[str, str, Server | None], ...]:
    """What the page draws of the servers; a change of it is worth a new drawing."""
    return tuple((name, s.problem, s.server) for name, s in sessions.items())


def blend_offer() -> BlendOffer | None:
    """The first blending contender's offer, the last known one when it is down."""
    offers = (session.server.blend for session in chat_sessions().values() if session.server)
    return next((offer for offer in offers if offer), None)


def blending_session() -> ChatSession | None:
    """The line to the first contender whose chunk cache can be filled."""
    found = (s for s in chat_sessions().values() if s.server and s.server.blend and s.server.blend.policy)
    return next(found, None)


def simllm_offer() -> SimLLMOffer | None:
    """As `blend_offer`, of the first contender that looks for similar prompts."""
    offers = (session.server.simllm for session in chat_sessions().values() if session.server)
    return next((offer for offer in offers if offer), None)


def separator() -> str:
    """The same for every contender, so that all get the same prompt."""
    offer = blend_offer()
    return offer.separator if offer else page_settings().separator


def open_chat(page: str = "chat") -> OpenChat:
    """The chat of the page's address, else the one that was open before another page was; a new one at first."""
    st.session_state.setdefault(_LINKED, dict(st.query_params))
    linked = st.query_params.get(page, "")
    if opened := chat_store(page).get(linked or st.session_state.get(page, "")):
        return _remember(opened, page)
    opened = new_chat(page)
    if linked:
        st.session_state[_LOST] = opened.chat.key
    return opened


def is_for_lost_link(opened: OpenChat) -> bool:
    """Whether this chat is new because the one that the page's address named is not known."""
    return bool(st.session_state.get(_LOST) == opened.chat.key)


def new_chat(page: str = "chat") -> OpenChat:
    return _remember(chat_store(page).new(), page)


def choose_linked(key: str, choices: Collection[str], label: str) -> None:
    """Before a choice is drawn for the first time: the one that the page's address names, if it is one."""
    linked = st.query_params.get(key)
    if linked is None or key in st.session_state:
        return
    if linked in choices:
        st.session_state[key] = linked
    else:
        _unknown()[key] = UnknownLink(label, linked)


def link(key: str, chosen: str) -> None:
    """Puts a choice into the page's address, for a reload, with the next `send_links`. One that was not known is
    forgotten with the next choice.
    """
    if (unknown := _unknown().get(key)) and unknown.instead not in ("", chosen):
        del _unknown()[key]
    elif unknown:
        _unknown()[key] = replace(unknown, instead=chosen)
    st.session_state.setdefault(_CHOSEN, {})[key] = chosen


def send_links() -> None:
    """All choices of this script run at once: each change of the address is an entry in the browser's history."""
    chosen: dict[str, str] = st.session_state.pop(_CHOSEN, {})
    if any(st.query_params.get(key) != value for key, value in chosen.items()):
        st.query_params.update(chosen)


def unknown_links() -> list[UnknownLink]:
    return list(_unknown().values())


def _unknown() -> dict[str, UnknownLink]:
    found: dict[str, UnknownLink] = st.session_state.setdefault("unknown-links", {})
    return found


def refused_settings(opened: OpenChat) -> dict[str, str]:
    """What the page's address said of its controls when it was opened, and none has taken. Call once they are drawn.

    Of the chat that it was opened with, until something is asked there. A server that is still to come up may bring a
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
    """Whether a control of this key would be on the page, if there were one."""
    if key.startswith(OF_BLEND):
        is_offered = blend_offer() is not None
    elif key in OF_SIMLLM:
        is_offered = simllm_offer() is not None
    else:
        return True
    return is_offered or all(session.server for session in chat_sessions().values())


def _is_taken(key: str, value: str) -> bool:
    """Streamlit drops a value from the address that is the control's default, or not one of its values."""
    held = st.session_state.get(key)
    if isinstance(held, int | float) and not isinstance(held, bool):
        try:
            return math.isclose(float(value), held)
        except ValueError:
            return False
    return str(held).lower() == value.lower()


def _remember(opened: OpenChat, page: str) -> OpenChat:
    """In the address, for a reload; and in this session, for a page that is left takes its address along."""
    st.query_params[page] = st.session_state[page] = opened.chat.key
    return opened
