"""What outlives a script run: the sessions with the contenders, the chats, and what this page has chosen.

Resources are shared by every page of the process; `st.session_state` is this page's alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import wait

import streamlit as st

from chat import Chat, Context
from chat_session import ChatSession, SlotSession
from contender_api import BlendOffer, Server, SimLLMOffer
from context_view import TokenCount, count_context
from kvarena.documents import DocumentCache, Documents, TextChunk, load_documents, name_chunks
from kvarena.splitting import Splitter, find_splitter
from runs import ChatStore, OpenChat
from settings import Settings, read_settings
from slots import MODES, SlotChat
from uploads import Upload

REFRESH_AGE_S = 3.0


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
def chat_store(page: str = "chat") -> ChatStore:
    """Of the arena (`chat`) or of the conversations (`conversation`)."""
    return ChatStore(make_chat=SlotChat if page == "conversation" else Chat)


@st.cache_resource(show_spinner=False)
def _document_cache() -> DocumentCache:
    return {}


def splitter() -> Splitter:
    """As `kvarena warm` splits; its tokenizer may come later, with the download of a hub model."""
    settings = page_settings()
    return find_splitter(settings.tokenizer, settings.chunk_tokens)


@st.cache_data(ttl=3, show_spinner="Reading the documents")
def folder_documents() -> Documents:
    """Of the data folder; only files that have changed are read and split again."""
    return load_documents(page_settings().data_dir, splitter(), _document_cache())


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


@st.cache_data(max_entries=256, show_spinner=False)
def _counted(_session: ChatSession, url: str, model: str, context: Context) -> TokenCount:
    return count_context(_session, context)


def token_count(session: ChatSession, context: Context) -> TokenCount:
    """As `count_context`, kept for as long as the same server serves the same model."""
    model = session.server.model if session.server else ""
    return _counted(session, session.contender.url, model, context)


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
    key = st.query_params.get(page) or st.session_state.get(page, "")
    opened = chat_store(page).get(key)
    return _remember(opened, page) if opened else new_chat(page)


def new_chat(page: str = "chat") -> OpenChat:
    return _remember(chat_store(page).new(), page)


def _remember(opened: OpenChat, page: str) -> OpenChat:
    """In the address, for a reload; and in this session, for a page that is left takes its address along."""
    st.query_params[page] = st.session_state[page] = opened.chat.key
    return opened
