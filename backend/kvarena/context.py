"""The prompt that is built from text chunks. Where these come from is `documents.py`, whose names are here too.

Used by whatever builds a context: the page, the warm-up, the benchmarks. No tokens, no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvarena.documents import SYSTEM_PROMPT_NAME, TextChunk, load_chunks, load_system_prompt, read_text

__all__ = [
    "SYSTEM_PROMPT_NAME",
    "TextChunk",
    "build_messages",
    "join_chunks",
    "load_chunks",
    "load_system_prompt",
    "read_text",
]


def join_chunks(texts: Sequence[str], separator: str) -> str:
    """The chunks with the separator before each and after the last, so that every chunk has two exact boundaries."""
    return "".join(separator + text for text in texts) + separator if texts else ""


def build_messages(system: str, texts: Sequence[str], question: str, separator: str) -> list[dict[str, str]]:
    """The first turn of a chat over these chunks."""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": join_chunks(texts, separator) + question}]
