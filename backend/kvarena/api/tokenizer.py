"""What the server and the engines need of a tokenizer; Hugging Face's fast ones have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import tokenizers


class Tokenizer(Protocol):
    """The part of `transformers.PreTrainedTokenizerFast` that is used."""

    chat_template: Any
    eos_token_id: int | None

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer: ...

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str]: ...

    def apply_chat_template(self, conversation: Sequence[Any], **arguments: Any) -> Any: ...
