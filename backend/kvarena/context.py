"""Text chunks of a folder, and the prompt that is built from them.

Used by whatever builds a context: the page, the warm-up, the benchmarks. No tokens, no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHUNK_SUFFIXES = (".txt", ".md")
SYSTEM_PROMPT_NAME = "sys_prompt.txt"


@dataclass(frozen=True)
class TextChunk:
    """A chunk file: its path within the folder, without suffix, and its text without surrounding white space."""

    name: str
    text: str


def read_text(path: Path) -> str:
    """A file's text without byte order mark. Raises `ValueError` naming a file that can't be read, or isn't UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read as UTF-8 text: {error}") from error
    return text.replace("\r\n", "\n").strip()


def load_chunks(folder: Path) -> list[TextChunk]:
    """Every non-empty `.txt` and `.md` file below `folder` except the system prompt, in natural order (2 before 10).

    Hidden files and folders are left out. Raises `ValueError` when the folder does not exist, and as `read_text` does.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder of chunk files at {folder}")
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in CHUNK_SUFFIXES]
    shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    chunks = [
        TextChunk(path.with_suffix("").as_posix(), read_text(folder / path))
        for path in sorted(shown, key=lambda path: _natural_order(path.as_posix()))
        if path.name != SYSTEM_PROMPT_NAME and (folder / path).is_file()
    ]
    return [chunk for chunk in chunks if chunk.text]


def load_system_prompt(folder: Path) -> str:
    """Empty where the folder has none. Raises `ValueError` as `read_text` does."""
    path = folder / SYSTEM_PROMPT_NAME
    return read_text(path) if path.is_file() else ""


def join_chunks(texts: Sequence[str], separator: str) -> str:
    """The chunks with the separator before each and after the last, so that every chunk has two exact boundaries."""
    return "".join(separator + text for text in texts) + separator if texts else ""


def build_messages(system: str, texts: Sequence[str], question: str, separator: str) -> list[dict[str, str]]:
    """The first turn of a chat over these chunks."""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": join_chunks(texts, separator) + question}]


def _natural_order(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
