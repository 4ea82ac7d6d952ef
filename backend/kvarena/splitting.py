"""Splits a long text into chunks of at most so many tokens: at headings, paragraphs and sentences, in this order.

semantic-text-splitter does the splitting; here are the size, the tokenizer that counts, and what becomes of crumbs. The
same text, size and tokenizer give the same chunks everywhere, or the chunk cache would find nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
    from tokenizers import Tokenizer

DEFAULT_CHUNK_TOKENS = 512
MIN_CHUNK_TOKENS = 64
ESTIMATED_BYTES_PER_TOKEN = 4
CRUMB_SHARE = 16
"""A piece below a 16th of the size joins its neighbour: the blend keeps no chunk of a few tokens."""


@dataclass(frozen=True)
class Splitter:
    """`tokenizer_file` counts the tokens; without one they are estimated, at 4 bytes of UTF-8 each."""

    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    tokenizer_file: Path | None = None

    @property
    def estimates(self) -> bool:
        return self.tokenizer_file is None

    def count(self, text: str) -> int:
        """Tokens of the text alone, without special tokens around it."""
        if self.tokenizer_file is None:
            return _estimated_tokens(text)
        return len(_tokenizer(self.tokenizer_file).encode(text, add_special_tokens=False))

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer reads as special tokens; unknown without one."""
        return special_tokens(_tokenizer(self.tokenizer_file)) if self.tokenizer_file else ()

    def split(self, text: str, is_markdown: bool = False) -> list[str]:
        """Its chunks in order, without surrounding white space; the text itself if it fits."""
        if self.count(text) <= self.chunk_tokens:
            return [text]
        crumb = self.chunk_tokens // CRUMB_SHARE
        pieces = self._splitter(self.chunk_tokens - crumb, is_markdown).chunk_indices(text)
        spans: list[tuple[int, int]] = []
        for start, piece in pieces:
            end = start + len(piece)
            if spans and self._belong_together(text, spans[-1], (start, end), crumb):
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        return [text[start:end] for start, end in spans]

    def _belong_together(self, text: str, before: tuple[int, int], after: tuple[int, int], crumb: int) -> bool:
        is_crumb = any(self.count(text[start:end]) < crumb for start, end in (before, after))
        return is_crumb and self.count(text[before[0] : after[1]]) <= self.chunk_tokens

    def _splitter(self, capacity: int, is_markdown: bool) -> TextSplitter | MarkdownSplitter:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter

        kind = MarkdownSplitter if is_markdown else TextSplitter
        if self.tokenizer_file is None:
            return kind.from_callback(_estimated_tokens, capacity)
        return kind.from_huggingface_tokenizer(_tokenizer(self.tokenizer_file), capacity)


def special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """What a tokenizer never reads as text, such as `</s>`."""
    return tuple(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)


def find_splitter(model_place: str, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> Splitter:
    """Counts with the `tokenizer.json` of a model's folder, or of its repository in a hub cache, which may still be to
    come; estimates if none can be read.
    """
    path = _tokenizer_file(Path(model_place)) if model_place else None
    try:
        if path is not None:
            _tokenizer(path)
    except Exception:  # the library raises Exception itself
        path = None
    return Splitter(chunk_tokens, path)


def _tokenizer_file(place: Path) -> Path | None:
    candidates = [place / "tokenizer.json"]
    try:
        revision = (place / "refs" / "main").read_text().strip()
        candidates.append(place / "snapshots" / revision / "tokenizer.json")
    except (OSError, UnicodeDecodeError):
        pass
    return next((path for path in candidates if path.is_file()), None)


@lru_cache(maxsize=2)
def _tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _estimated_tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // ESTIMATED_BYTES_PER_TOKEN)
