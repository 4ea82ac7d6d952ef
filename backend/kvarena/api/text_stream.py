"""A generation's tokens on their way to the client: detokenised, and searched for stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvarena.api.detokenizer import Detokenizer
from kvarena.api.engine import GeneratedToken
from kvarena.api.stop_strings import StopStrings
from kvarena.api.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """The text that became certain with a token; the last one of a text may come without a token."""

    text: str
    token: GeneratedToken | None = None


@dataclass(frozen=True)
class StopRule:
    strings: tuple[str, ...] = ()
    include: bool = False


class TextStream:
    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: StopRule) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._stops = StopStrings(stop.strings, include=stop.include)

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def push(self, token: GeneratedToken) -> Piece:
        return Piece(self._stops.push(self._detokenizer.push(token.token_id)), token)

    def flush(self) -> Piece | None:
        rest = self._stops.flush()
        return Piece(rest) if rest else None
