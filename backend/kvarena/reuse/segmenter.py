"""Boundaries that the client gave, as token ranges: the separator in the prompt's text, or named texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvarena.reuse.boundaries import SeparatorFinder, text_segments
from kvarena.reuse.plan import TokenIds, as_token_ids
from kvarena.reuse.planner import Segment


class Segmenter:
    """Over the served model's tokenizer; finds nothing where the server runs without one."""

    def __init__(self, tokenizer: Any, separator: str) -> None:
        self._tokenizer = tokenizer
        self._finder: SeparatorFinder | None = None
        if tokenizer is not None and separator.strip():
            self._finder = SeparatorFinder(separator, _TokenText(tokenizer), _vocabulary(tokenizer))

    def segments(self, token_ids: TokenIds, texts: Sequence[str] = ()) -> list[Segment]:
        """`texts` given by the client go before the separator."""
        if texts and self._tokenizer is not None:
            encoded = [as_token_ids(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]
            return text_segments(token_ids, encoded)
        return self._finder.segments(token_ids) if self._finder else []


class _TokenText:
    """A token's text as it reads behind another one: decoders drop the white space that opens a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_length = len(self._decode(self._anchor))

    def __call__(self, token: int) -> str:
        return self._decode([*self._anchor, token])[self._anchor_length :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _vocabulary(tokenizer: Any) -> list[str | None]:
    tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return tokens
