"""Documents that were dropped on the page, and how far the chunk cache is filled with their chunks. Draws nothing."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from chat_session import ChatSession
from kvarena.client import ChunkOutcome
from kvarena.documents import DOCUMENT_SUFFIXES, Document, TextChunk, printable, read_document
from kvarena.splitting import Splitter

MAX_UPLOAD_MB = 20
MAX_KEPT_BYTES = 4 << 20
"""Of a page's own documents, that come back with its chat."""


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
    """One document; without a `filling` where nothing that blends was up."""

    document: Document
    filling: Filling | None = None

    @cached_property
    def num_bytes(self) -> int:
        """Of its text: looked at whenever the page is drawn."""
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
    """Of one whose file is gone: its text's."""
    return upload_key(document.path, "\0".join(document.parts).encode("utf-8", "replace"))


def kept_documents(uploads: Iterable[Upload]) -> tuple[Document, ...]:
    """Those that come back with the chat: in their order, as many as there is room for."""
    kept, room = [], MAX_KEPT_BYTES
    for upload in uploads:
        if upload.document.parts and upload.num_bytes <= room:
            kept.append(upload.document)
            room -= upload.num_bytes
    return tuple(kept)


def save_document(document: Document, folder: Path) -> Path:
    """Writes its text into the data folder, under its own name with a number where there is such a file.

    Raises `OSError`.
    """
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
    """A document, or the problem that it is."""
    if PurePosixPath(name).suffix.lower() not in DOCUMENT_SUFFIXES:
        return Document(printable(name), problem="not a .txt, .md or .pdf file")
    if len(data) > MAX_UPLOAD_MB << 20:
        reason = f"{len(data) / (1 << 20):.0f} MB; at most {MAX_UPLOAD_MB} MB are taken. Put it into the data folder"
        return Document(printable(name), problem=reason)
    return read_document(name, data, splitter)
