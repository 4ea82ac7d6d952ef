"""From a generation's tokens to its text: detokenised one at a time, and searched for stop strings. Also single tokens
as text and bytes, with logprobs in the two forms that OpenAI has for them.

The work is tokenizers' `DecodeStream`. A character whose bytes come in several tokens comes with the last of them. The
stream is primed with the end of the prompt, for many decoders write a text's first token differently (without its
space). Bytes that never become a character are left out at the end of a text.

The stop string that is complete first ends the text, before it or (`include`) after it; of several that are complete
with the same character, the one that was named first. An end of the text that could begin a stop string is held back,
so what comes out doesn't depend on how the text was cut into tokens.

A single token may be a part of a character: `tokenizer.decode` shows it as U+FFFD. Its bytes are read from its name in
the vocabulary, which byte-level BPE writes in an alphabet of 256 printable characters, and others as `<0xE2>`. Infinite
logprobs, which JSON can't say, are written as -9999.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers.decoders import DecodeStream

from kvarena.engines.base import GeneratedToken, Tokenizer
from kvarena.server.protocol import ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob

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


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def text(self, token_id: int) -> str:
        return self._look_up(token_id)[0]

    def utf8(self, token_id: int) -> bytes:
        return self._look_up(token_id)[1]

    def _look_up(self, token_id: int) -> tuple[str, bytes]:
        if token_id not in self._known:
            text = self._within_a_text(token_id)
            self._known[token_id] = text, self._bytes(token_id, text)
        return self._known[token_id]

    def _within_a_text(self, token_id: int) -> str:
        """What the token adds to a text: many decoders leave out the space before a text's first word."""
        alone = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tokenizer.decode([token_id, token_id], skip_special_tokens=False).removeprefix(alone)

    def _bytes(self, token_id: int, text: str) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens([token_id])[0] if "\ufffd" in text else None
        if name is None:
            return text.encode()
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        alphabet = _byte_of_character()
        return bytes(alphabet[c] for c in name) if all(c in alphabet for c in name) else text.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own Latin-1 character, the others follow one another from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_LOWEST_LOGPROB = -9999.0


def chat_logprobs(texts: TokenTexts, tokens: Sequence[GeneratedToken]) -> ChatLogprobs:
    return ChatLogprobs(content=[_chat_token(texts, token) for token in tokens])


def _chat_token(texts: TokenTexts, token: GeneratedToken) -> TokenLogprob:
    top = [
        TopLogprob(token=texts.text(token_id), logprob=_finite(logprob), bytes=list(texts.utf8(token_id)))
        for token_id, logprob in token.top
    ]
    return TokenLogprob(
        token=texts.text(token.token_id),
        logprob=_finite(token.logprob),
        bytes=list(texts.utf8(token.token_id)),
        top_logprobs=top,
    )


def text_logprobs(texts: TokenTexts, tokens: Sequence[GeneratedToken], first_offset: int = 0) -> TextLogprobs:
    """`top_logprobs` has the most likely token first, and the drawn one in addition, where it isn't among them."""
    names = [texts.text(token.token_id) for token in tokens]
    tops: list[dict[str, float]] = []
    for token in tokens:
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            top.setdefault(texts.text(token_id), _finite(logprob))  # two tokens may have one text
        tops.append(top)
    offsets = [first_offset]
    for name in names:
        offsets.append(offsets[-1] + len(name))
    return TextLogprobs(
        tokens=names,
        token_logprobs=[_finite(token.logprob) for token in tokens],
        top_logprobs=tops,
        text_offset=offsets[:-1],
    )


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB
