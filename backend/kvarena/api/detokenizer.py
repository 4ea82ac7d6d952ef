"""Text from tokens, one at a time. A character whose bytes come in several tokens comes with the last of them.

The work is tokenizers' `DecodeStream`. It is primed with the end of the prompt, for many decoders write a text's first
token differently (without its space). Bytes that never become a character are left out at the end of a text.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from kvarena.api.tokenizer import Tokenizer

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
