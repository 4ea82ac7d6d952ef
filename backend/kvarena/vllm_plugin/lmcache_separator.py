"""The separator as LMCache's blender finds it: by its token ids, not by its text.

LMCache takes `tokenizer.encode(blend_special_str)[1:]`, meaning to drop a token that begins every text, and looks for
these ids in the prompt. In a prompt the separator's text becomes other tokens (LMCache issues 1136, 2639): white space
at its ends goes to its neighbours, some tokenizers put a space before every text, and others have no token that begins
it, so that one of the separator's own is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

NEIGHBOURS = [(left, right) for left in ("end", "end.", "7") for right in ("The", "the", "a", "7")]
"""What may stand before and after a separator."""


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...


def special_string(tokenizer: Tokenizer, separator: str) -> str:
    """What `blend_special_str` must be for LMCache to find `separator` between texts, once wherever it stands.

    Raises `ValueError` when nothing serves.
    """
    prompts = [tokenizer.encode(left + separator + right) for left, right in NEIGHBOURS]
    for candidate in _candidates(separator):
        searched = tokenizer.encode(candidate)[1:]
        if searched and all(_count(searched, ids) == 1 for ids in prompts):
            return candidate
    raise ValueError(
        f"its tokenizer reads the separator {separator!r} differently beside different texts, and LMCache's own "
        "blender looks for the same tokens everywhere; set SEPARATOR to another one, such as a special token"
    )


def _candidates(separator: str) -> Iterator[str]:
    """Without spaces at its ends first; behind a letter for tokenizers whose first token is the separator's own."""
    bodies = dict.fromkeys((separator.strip(" "), separator.rstrip(" "), separator.lstrip(" "), separator))
    for body in bodies:
        for before in ("", "a"):
            yield before + body


def _count(searched: Sequence[int], ids: Sequence[int]) -> int:
    length = len(searched)
    return sum(list(ids[i : i + length]) == list(searched) for i in range(len(ids) - length + 1))
