"""Documents on the page: which files can't be used, what was dropped or pasted here, and how far its KV is filled."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path, PurePosixPath

import streamlit as st

import state
from chat_session import ChatSession
from kvarena.client import ChunkOutcome
from kvarena.documents import (
    DOCUMENT_SUFFIXES,
    Document,
    Documents,
    Remark,
    TextChunk,
    name_chunks,
    printable,
    read_document,
    without_special_tokens,
)
from kvarena.splitting import Splitter

MAX_UPLOAD_MB = 20
MAX_KEPT_BYTES = 4 << 20
"""So much text of a page's own documents comes back with its chat."""
POLL_S = 0.5
FOLDER_POLL_S = 4.0
NUM_OPEN_REMARKS = 4
SAVE, REMOVE = ":material/save:", ":material/delete:"
_NEW, _SEEN, _FILLING = "new-in-folder", "seen-in-folder", "filled-together"


@dataclass
class Filling:
    """Chunks on their way into the chunk cache. `outcomes` grows in the session's thread."""

    num_chunks: int
    outcomes: list[ChunkOutcome] = field(default_factory=list)
    future: Future[None] | None = None
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    @classmethod
    def start(cls, chunks: Sequence[TextChunk], session: ChatSession) -> Filling:
        filling = cls(len(chunks))
        filling.future = session.fill(chunks, filling.outcomes.append)
        filling.future.add_done_callback(filling._end)
        return filling

    def _end(self, _future: Future[None]) -> None:
        self.ended_s = time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.future is None or self.future.done()

    @property
    def failures(self) -> list[ChunkOutcome]:
        return [outcome for outcome in list(self.outcomes) if outcome.outcome == "failed"]

    def stop(self) -> None:
        if self.future is not None:
            self.future.cancel()


@dataclass
class Upload:
    """One document. No `filling`: nothing that blends was up when it came, or it is to stay cold."""

    document: Document
    filling: Filling | None = None

    @cached_property
    def num_bytes(self) -> int:
        """Of its text. Cached, since every drawing of the page needs it."""
        return sum(len(part.encode("utf-8", "replace")) for part in self.document.parts)

    @property
    def is_filling(self) -> bool:
        return self.filling is not None and not self.filling.is_over

    @property
    def is_filled(self) -> bool:
        return self.filling is not None and self.filling.is_over and not self.filling.failures


def upload_key(name: str, data: bytes) -> str:
    """The same file dropped twice is one upload."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass") + b"\0" + data).hexdigest()[:16]


def document_key(document: Document) -> str:
    """Of a document whose file is gone: from its text."""
    return upload_key(document.path, "\0".join(document.parts).encode("utf-8", "replace"))


def kept_documents(uploaded: Iterable[Upload]) -> tuple[Document, ...]:
    """Those that come back with the chat: in their order, as many as there is room for."""
    kept, room = [], MAX_KEPT_BYTES
    for upload in uploaded:
        if upload.document.parts and upload.num_bytes <= room:
            kept.append(upload.document)
            room -= upload.num_bytes
    return tuple(kept)


def save_document(document: Document, folder: Path) -> Path:
    """Writes its text into the data folder, with a number in the name if there is such a file. Raises `OSError`."""
    stem = PurePosixPath(document.path.replace("\\", "/")).stem.lstrip(".") or "document"
    text = "\n\n".join(document.parts)
    for number in itertools.count(1):
        path = folder / f"{stem}{f' {number}' if number > 1 else ''}.txt"
        try:
            with path.open("x", encoding="utf-8", errors="replace") as file:
                file.write(text)
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers don't end")


def read_upload(name: str, data: bytes, splitter: Splitter) -> Document:
    """If it can't be used, a document that has the problem."""
    if PurePosixPath(name).suffix.lower() not in DOCUMENT_SUFFIXES:
        return Document(printable(name), problem="not a .txt, .md or .pdf file")
    if len(data) > MAX_UPLOAD_MB << 20:
        reason = f"{len(data) / (1 << 20):.0f} MB; at most {MAX_UPLOAD_MB} MB are taken. Put it into the data folder"
        return Document(printable(name), problem=reason)
    return read_document(name, data, splitter)


# -- on the page -------------------------------------------------------------------------------------------------------


def uploads() -> dict[str, Upload]:
    """What was added on this page, by key; gone with the session."""
    found: dict[str, Upload] = st.session_state.setdefault("uploads", {})
    return found


def uploaded_chunks() -> dict[str, tuple[TextChunk, ...]]:
    """The chunks of each upload by its key, named unlike any chunk of the data folder."""
    documents = [upload.document for upload in uploads().values()]
    return dict(zip(uploads(), name_chunks(documents, state.chunk_files().keys()), strict=True))


def loaded_chunks() -> dict[str, TextChunk]:
    """The data folder's and the uploaded ones, by name."""
    return state.chunk_files() | {chunk.name: chunk for named in uploaded_chunks().values() for chunk in named}


@st.fragment(run_every=FOLDER_POLL_S)
def watch_folder(drawn: Documents, busy: bool) -> None:
    """Redraws the page when a file of the folder has changed. Files that are new to this page are filled, if documents
    are; what the page saved itself isn't new.
    """
    if busy:
        return
    now = state.read_folder()
    texts = frozenset((chunk.name, chunk.text) for chunk in now.chunks)
    seen, st.session_state[_SEEN] = st.session_state.get(_SEEN, texts), texts
    if new := [chunk for chunk in now.chunks if (chunk.name, chunk.text) not in seen]:
        found = st.session_state[_NEW] = Upload(Document("New in the data folder", tuple(chunk.text for chunk in new)))
        if _fills_at_once() and (session := state.blending_session()):
            found.filling = Filling.start(new, session)
    if new or now != drawn:
        state.folder_documents.clear()
        st.rerun()


def draw_new_in_folder(busy: bool) -> None:
    """What came into the folder while the page was open, and whether its KV is filled."""
    if found := st.session_state.get(_NEW):
        st.fragment(_draw_status, run_every=POLL_S if found.is_filling else None)(found, found.is_filling, busy, None)


def draw_remarks(documents: Documents) -> None:
    """Every file of the folder that can't be used, and notes on files whose encoding was guessed."""
    parts = [
        _remarks_html(f"{_count(len(documents.problems), 'file')} can't be used", documents.problems, "problems"),
        _remarks_html("Notes on files", documents.notes, "notes"),
    ]
    if html := "".join(parts):
        st.html(html)
    if documents.is_split and state.splitter().estimates:
        st.caption("Sizes of chunks are estimated at 4 bytes a token: the model's tokenizer.json isn't here.")


def draw_uploads(busy: bool, chosen: Sequence[str]) -> None:
    """Where to drop or paste documents, and those that are here. `chosen` are the names of the context's chunks."""
    number = st.session_state.setdefault("num-dropped", 0)
    files = st.file_uploader(
        f"Drop your documents: {', '.join(DOCUMENT_SUFFIXES)}, up to {MAX_UPLOAD_MB} MB each",
        accept_multiple_files=True,
        key=f"documents-{number}",
        help="They are split like the files of the data folder, and come back with this chat's link, up to "
        f"{MAX_KEPT_BYTES >> 20} MB of text. Save them into that folder to keep them for every chat.",
    )
    with st.expander("Paste a text", key="paste"):
        name = st.text_input("Name", "pasted", key="paste-name")
        st.text_area("Text", key="paste-text", height=120)
        st.button("Add", key="paste-add", on_click=_take_pasted, args=[name])
    st.toggle(
        "Fill the KV at once",
        value=True,
        **state.linked("fill-at-once"),
        help="Compute and store a document's KV as soon as it is added. Off: it stays cold, so that the first question "
        "over it shows what a cold store costs.",
    )
    if files:
        with st.spinner("Splitting into chunks"):
            _take([(file.name, file.getvalue()) for file in files])
        st.session_state["num-dropped"] = number + 1  # an empty uploader: what came is listed below it
        st.rerun()
    _draw_total()
    chunks = uploaded_chunks()
    usable = [[chunk.name for chunk in named] for named in chunks.values() if named]
    if len(usable) > 1:
        names = list(itertools.chain(*usable))
        st.button("Use all my documents", key="use-all", on_click=state.choose_chunks, args=[names])
    kept = kept_documents(uploads().values())
    for key, upload in list(uploads().items()):
        with st.container(key=f"upload-{key}"):
            _draw_upload(key, upload, chunks[key], busy, chosen, upload.document in kept)


def _take(files: Sequence[tuple[str, bytes]]) -> None:
    here, num_known, num_chunks = uploads(), 0, 0
    for name, data in files:
        document = read_upload(name, data, state.splitter())
        known = {document_key(upload.document) for upload in here.values() if upload.document.parts}
        if upload_key(name, data) in here or document_key(document) in known:  # it came back without its file
            num_known += 1
        else:
            _add(upload_key(name, data), document)
            num_chunks += len(document.parts)
    others = f"; {num_known} {'was' if num_known == 1 else 'were'} here already" if num_known else ""
    st.toast(f"{_count(len(files) - num_known, 'document')} added: {_count(num_chunks, 'chunk')}{others}")


def _take_pasted(name: str) -> None:
    text = st.session_state["paste-text"]
    if text.strip():
        _take([(f"{name.strip() or 'pasted'}.txt", text.encode("utf-8", "replace"))])
        st.session_state["paste-text"] = ""


def bring_back(documents: Iterable[Document]) -> None:
    """For a chat that is opened again. Chunks whose KV is still there are only looked up."""
    for document in documents:
        _add(document_key(document), document)


def _add(key: str, document: Document) -> None:
    uploads()[key] = Upload(document)
    if _fills_at_once():
        _fill(key)


def _fills_at_once() -> bool:
    """Works before the switch is drawn: the page's address has its value unless it is the default."""
    linked = st.query_params.get("fill-at-once", "true").lower() == "true"
    return bool(st.session_state.get("fill-at-once", linked))


def _edit(key: str, index: int) -> None:
    """Replaces the document by one with the chunk as it was typed."""
    parts = list(uploads()[key].document.parts)
    typed = without_special_tokens(st.session_state[f"text-{key}-{index}"], state.splitter().special_tokens)
    parts[index] = typed.strip() or parts[index]
    document = replace(uploads()[key].document, parts=tuple(parts))
    edited = upload_key(document.path, "\0".join(parts).encode("utf-8", "replace"))
    places = [edited if other == key else other for other in uploads()]
    _remove(key)
    _add(edited, document)
    kept = {other: uploads()[other] for other in dict.fromkeys(places)}  # it stays where it was
    uploads().clear()
    uploads().update(kept)


def _save(key: str) -> None:
    document = uploads()[key].document
    try:
        path = save_document(document, state.page_settings().data_dir)
    except OSError as error:
        st.toast(f"{document.path} can't be saved: {error.strerror or error}", icon=":material/error:")
        return
    _remove(key)
    st.session_state.pop(_SEEN, None)
    state.folder_documents.clear()
    st.toast(f"Saved as {path}", icon=":material/save:")


def _fill(key: str) -> None:
    session, chunks = state.blending_session(), uploaded_chunks()[key]
    if session and chunks:
        uploads()[key].filling = Filling.start(chunks, session)


def _remove(key: str) -> None:
    if (upload := uploads().pop(key, None)) and upload.filling:
        upload.filling.stop()


def _draw_upload(
    key: str,
    upload: Upload,
    chunks: Sequence[TextChunk],
    busy: bool,
    chosen: Sequence[str],
    is_kept: bool,
) -> None:
    st.fragment(_draw_status, run_every=POLL_S if upload.is_filling else None)(upload, upload.is_filling, busy, is_kept)
    with st.container(horizontal=True, key=f"upload-buttons-{key}"):
        if chunks:
            names = [chunk.name for chunk in chunks]
            st.button(
                "Only this",
                key=f"use-{key}",
                on_click=state.choose_chunks,
                args=[names],
                help="Select the chunks of this document, and no others.",
            )
            new = [name for name in names if name not in chosen]
            st.button(
                "Add",
                key=f"add-{key}",
                on_click=state.choose_chunks,
                args=[[*chosen, *new]],
                disabled=not new,
                help="Put the chunks of this document after those selected.",
            )
            _draw_edit(key, chunks)
            if not upload.is_filling and not upload.is_filled and state.blending_session():
                st.button(
                    "Fill",
                    key=f"fill-{key}",
                    on_click=_fill,
                    args=[key],
                    help="Compute the KV of this document now, and store it.",
                )
            st.button(
                SAVE, key=f"save-{key}", on_click=_save, args=[key], help="Save: put it into the data folder, to stay."
            )
        st.button(REMOVE, key=f"remove-{key}", on_click=_remove, args=[key], help="Remove it from this chat.")


def _draw_edit(key: str, chunks: Sequence[TextChunk]) -> None:
    with st.popover("Edit", key=f"edit-{key}"):
        names = [chunk.name for chunk in chunks]
        index = names.index(st.selectbox("Chunk", names, key=f"edit-chunk-{key}")) if len(names) > 1 else 0
        st.text_area("Text", chunks[index].text, key=f"text-{key}-{index}", height=240)
        st.button("Keep", key=f"keep-{key}", on_click=_edit, args=[key, index], help="Its KV is computed anew.")


def _draw_total() -> None:
    """Of all documents that were filled since none was being filled."""
    here = uploads()
    filling = {key for key, upload in here.items() if upload.is_filling}
    before, was_filling = st.session_state.get(_FILLING, (set(), False))
    together: set[str] = (filling | before if was_filling or not filling else filling) & here.keys()
    st.session_state[_FILLING] = together, bool(filling)
    fillings = [upload.filling for key, upload in here.items() if key in together and upload.filling]
    if len(fillings) > 1:
        st.fragment(_draw_filling, run_every=POLL_S if filling else None)(fillings)


def _draw_filling(fillings: Sequence[Filling]) -> None:
    st.html(total_html(fillings))


def _draw_status(upload: Upload, was_filling: bool, busy: bool, is_kept: bool | None) -> None:
    """Redraws the page when the filling has ended."""
    if was_filling and not upload.is_filling and not busy:
        st.rerun()
    st.html(upload_html(upload, is_kept))


def upload_html(upload: Upload, is_kept: bool | None = None) -> str:
    """`is_kept`: whether it comes back with the chat; None: it is in the data folder."""
    document, filling = upload.document, upload.filling
    status, text, bar = "problem", document.problem, ""
    if document.parts:
        cold = "" if filling else ", cold: KV not filled"
        status, text = "split", f"{_count(len(document.parts), 'chunk')}{cold}"
    if filling and not filling.is_over:
        status, text, bar = "filling", _filled_text([filling]), _bar_html([filling])
    elif filling and not filling.failures:
        status = "filled"
        too_short = sum(outcome.outcome == "too_short" for outcome in filling.outcomes)
        text += f", KV filled{f', {too_short} too short to be kept' if too_short else ''}"
    if filling and (failures := filling.failures):
        status = "failed" if filling.is_over else status
        text += f"; the KV of {len(failures)} isn't there. {failures[0].name}: {failures[0].reason}"
    detail = escape("; ".join(filter(None, (text, document.note))))
    return (
        f'<div class="ka-upload" data-testid="upload" data-document="{escape(document.path)}" data-state="{status}">'
        f"<b>{escape(document.path)}</b><small>{detail}</small>{bar}{_kept_html(document, is_kept)}</div>"
    )


def _kept_html(document: Document, is_kept: bool | None) -> str:
    """Only for a document that won't come back; where documents are dropped it says that others will."""
    if is_kept is not False or not document.parts:
        return ""
    told = (
        f"Too large to come back after a reload: a chat keeps {MAX_KEPT_BYTES >> 20} MB of documents. Save it into "
        "the data folder to have it then"
    )
    return f'<small data-kept="false">{told}</small>'


def total_html(fillings: Sequence[Filling]) -> str:
    """How far several documents are, in one line, and how long it took."""
    text = f"{_filled_text(fillings)}, {_count(len(fillings), 'document')}, {_seconds(fillings):.0f} s"
    bar = "" if all(filling.is_over for filling in fillings) else _bar_html(fillings)
    return f'<div class="ka-upload" data-testid="uploads-total"><small>{text}</small>{bar}</div>'


def _seconds(fillings: Sequence[Filling]) -> float:
    """From the first one's start to the last one's end, or to now."""
    now_s = time.monotonic()
    ends = [now_s if filling.ended_s is None else filling.ended_s for filling in fillings]
    return max(ends) - min(filling.began_s for filling in fillings)


def _filled_text(fillings: Sequence[Filling]) -> str:
    num_filled = sum(len(filling.outcomes) - len(filling.failures) for filling in fillings)
    return f"KV of {num_filled} of {_count(sum(filling.num_chunks for filling in fillings), 'chunk')} filled"


def _bar_html(fillings: Sequence[Filling]) -> str:
    num_done = sum(len(filling.outcomes) for filling in fillings)
    return f'<progress value="{num_done}" max="{sum(filling.num_chunks for filling in fillings)}"></progress>'


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _remarks_html(title: str, remarks: Sequence[Remark], kind: str) -> str:
    if not remarks:
        return ""
    items = "".join(f"<li><b>{escape(remark.file)}</b> {escape(remark.text)}</li>" for remark in remarks)
    is_open = " open" if len(remarks) <= NUM_OPEN_REMARKS else ""
    return (
        f'<details class="ka-files" data-testid="file-{kind}"{is_open}><summary>{escape(title)}</summary>'
        f"<ul>{items}</ul></details>"
    )
