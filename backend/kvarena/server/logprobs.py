"""Single tokens as text and bytes, and logprobs in the two forms that OpenAI has for them.

A token may be a part of a character: `tokenizer.decode` shows it as U+FFFD. Its bytes are read from its name in the
vocabulary, which byte-level BPE writes in an alphabet of 256 printable characters, and others as `<0xE2>`. Infinite
logprobs, which JSON can't say, are written as -9999.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from kvarena.engines.base import GeneratedToken, Tokenizer
from kvarena.server.protocol import ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob

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
