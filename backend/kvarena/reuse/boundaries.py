"""Segments of a prompt that the client marked: by a separator string, or by naming the texts.

A separator tokenises differently in different surroundings (LMCache issues 1136, 2639), so it is looked for in the
*text* of the tokens: " # # " is found whichever tokens carry it. White space at its ends may be part of other tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvarena.reuse.matcher import ChunkIndex
from kvarena.reuse.plan import Chunk, TokenIds
from kvarena.reuse.planner import Segment

_TEXT_WINDOW = 8


class SeparatorFinder:
    """Finds a separator in token ids.

    `token_text(id)` is a token's text as it reads behind another token; `vocabulary` are the tokens' raw forms by
    id, used to skip every stretch of the prompt that can't hold the separator. Raises `ValueError` for a separator
    that isn't ASCII: a token may then carry part of a character.
    """

    def __init__(self, separator: str, token_text: Callable[[int], str], vocabulary: Sequence[str | None]) -> None:
        if not separator.isascii():
            raise ValueError(f"separator must be ASCII, not {separator!r}")
        self.separator = separator
        self._core = separator.strip()
        self._needs_space_before = separator[:1].isspace()
        self._needs_space_after = separator[-1:].isspace()
        self._token_text = token_text
        self._texts: dict[int, str] = {}
        self._may_hold = _tokens_with_any(self._core, vocabulary)

    def find(self, token_ids: TokenIds) -> list[Segment]:
        """The ranges of tokens that carry the separator, in order."""
        if not self._core:
            return []
        found: list[Segment] = []
        for start, end in self._candidate_ranges(token_ids):
            found += self._find_in(token_ids, start, end)
        return found

    def segments(self, token_ids: TokenIds) -> list[Segment]:
        """What stands before the first separator, and each separator with what follows it up to the next one.

        The separator is part of the chunk behind it: the first token of a text computed alone draws attention that
        no token of the prompt deserves, and so it is one that means nothing. Behind the last separator is the
        question, which is no segment.
        """
        starts = [0, *(start for start, _ in self.find(token_ids))]
        return [(start, end) for start, end in itertools.pairwise(starts) if start < end]

    def _candidate_ranges(self, token_ids: TokenIds) -> Iterable[Segment]:
        """Ranges around tokens that share a character with the separator, one more token on each side."""
        inside = np.minimum(token_ids, len(self._may_hold) - 1)
        hits = np.flatnonzero(self._may_hold[inside])
        if not len(hits):
            return
        breaks = np.flatnonzero(np.diff(hits) > len(self._core))
        for first, last in zip(hits[np.r_[0, breaks + 1]], hits[np.r_[breaks, len(hits) - 1]], strict=True):
            yield max(0, int(first) - 1), min(len(token_ids), int(last) + 2)

    def _find_in(self, token_ids: TokenIds, start: int, end: int) -> list[Segment]:
        texts = [self._text(int(token)) for token in token_ids[start:end]]
        text = "".join(texts)
        ends = np.cumsum([len(piece) for piece in texts])
        found: list[Segment] = []
        at = text.find(self._core)
        while at >= 0:
            stop = at + len(self._core)
            if self._has_its_space(text, at, stop):
                first = int(np.searchsorted(ends, at, side="right"))
                last = int(np.searchsorted(ends, stop, side="left"))
                found.append((start + first, start + last + 1))
                at = text.find(self._core, stop)
            else:
                at = text.find(self._core, at + 1)
        return [segment for i, segment in enumerate(found) if i == 0 or found[i - 1][1] <= segment[0]]

    def _has_its_space(self, text: str, at: int, stop: int) -> bool:
        before, after = text[at - 1 : at] if at else "", text[stop : stop + 1]
        return not (self._needs_space_before and before and not before.isspace()) and not (
            self._needs_space_after and after and not after.isspace()
        )

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._token_text(token)
        return self._texts[token]


def text_segments(token_ids: TokenIds, texts: Sequence[TokenIds]) -> list[Segment]:
    """Where texts, tokenised alone, stand in a prompt: their ends may tokenise differently there and are left out.

    A text of which less than half is found in one piece isn't in the prompt.
    """
    index = ChunkIndex(window=_TEXT_WINDOW)
    for ids in texts:
        index.add(Chunk(ids))
    spans = index.match(token_ids, min_tokens=_TEXT_WINDOW)
    return [(span.start, span.end) for span in spans if 2 * len(span) >= len(span.chunk)]


def _tokens_with_any(core: str, vocabulary: Sequence[str | None]) -> npt.NDArray[np.bool_]:
    """Which tokens may carry a part of `core`: raw forms spell ASCII as itself. The last entry is for ids beyond."""
    characters = {character for character in core if not character.isspace()}
    return np.array([*(token is None or not characters.isdisjoint(token) for token in vocabulary), True])
