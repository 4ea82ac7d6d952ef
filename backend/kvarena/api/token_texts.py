"""Single tokens as text and bytes, for logprobs. A token may be a part of a character; its bytes are exact all the
same.

`tokenizer.decode` shows such a token as U+FFFD. Its bytes are read from its name in the vocabulary, which byte-level
BPE writes in an alphabet of 256 printable characters, and others as `<0xE2>`.
"""

from __future__ import annotations

import re
from functools import cache

from kvarena.api.tokenizer import Tokenizer

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
