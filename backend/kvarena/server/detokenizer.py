"""From a generation's tokens to its text: detokenised one at a time, and searched for stop strings.

The work is tokenizers' `DecodeStream`. A character whose bytes come in several tokens comes with the last of them. The
stream is primed with the end of the prompt, for many decoders write a text's first token differently (without its
space). Bytes that never become a character are left out at the end of a text.

The stop string that is complete first ends the text, before it or (`include`) after it; of several that are complete
with the same character, the one that was named first. An end of the text that could begin a stop string is held back,
so what comes out doesn't depend on how the text was cut into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers.decoders import DecodeStream

from kvarena.engines.base import GeneratedToken, Tokenizer

_NUM_PRIMING_TOKENS = 32


class Detokenizer:
    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        before = list(prompt_ids[-_NUM_PRIMING_TOKENS:])
        if tokenizer.decode(before, skip_special_tokens=True).endswith("\ufffd"):
            before = []  # A prompt that ends within a character would come out with the character's end.
        self._stream = DecodeStream(ids=before, skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty within a character."""
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:
            # The text before the token isn't a prefix of the text with it, as when invalid bytes become a character.
            # What came out stays; the stream begins anew with this token.
            if "prefix" not in str(error):
                raise
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token_id) or ""


class StopStrings:
    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain now; the last of it when `found` has become true."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        if (end := self._first_end()) is not None:
            self.found = True
            out, self._held = self._held[:end], ""
            return out
        return self._release(len(self._held) - self._num_held())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out

    def _first_end(self) -> int | None:
        """Where the text ends, if it holds a stop string."""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        end, start = min(found, key=lambda match: match[0])
        return end if self._include else start

    def _num_held(self) -> int:
        """The length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The text that became certain with a token; the last one of a text may come without a token."""

    text: str
    num_prompt_tokens: int
    token: GeneratedToken | None = None


@dataclass(frozen=True)
class StopRule:
    strings: tuple[str, ...] = ()
    include: bool = False


class TextStream:
    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: StopRule) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._num_prompt_tokens = len(prompt_ids)
        self._stops = StopStrings(stop.strings, include=stop.include)

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def push(self, token: GeneratedToken) -> TextDelta:
        text = "" if token.is_end else self._detokenizer.push(token.token_id)
        return TextDelta(self._stops.push(text), self._num_prompt_tokens, token)

    def flush(self) -> TextDelta | None:
        rest = self._stops.flush()
        return TextDelta(rest, self._num_prompt_tokens) if rest else None
