"""A request's prompt as token ids, and how many more fit behind it."""

from __future__ import annotations

from typing import Protocol

from kvarena.api.engine import GenerationRequest
from kvarena.api.tokenizer import Tokenizer


class ServedModel(Protocol):
    """What a prompt has to fit."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...


def token_ids_of(request: GenerationRequest, model: ServedModel) -> list[int]:
    """Raises `ValueError` for an id that isn't in the vocabulary, and for an empty prompt."""
    if isinstance(request.prompt, str):
        token_ids = model.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens)
    else:
        token_ids = list(request.prompt)
    check_in_vocabulary(token_ids, model.vocab_size)
    return token_ids


def check_in_vocabulary(token_ids: list[int], vocab_size: int) -> None:
    if not token_ids:
        raise ValueError("the prompt is empty; it needs at least one token")
    if bad := [token for token in token_ids if not 0 <= token < vocab_size]:
        raise ValueError(f"token id {bad[0]} is not in the vocabulary: ids go from 0 to {vocab_size - 1}")


def num_tokens_to_generate(num_prompt_tokens: int, wanted: int | None, model: ServedModel) -> int:
    """`wanted`, or what is left of the context. Raises `ValueError` when there is no such room."""
    longest = model.max_model_len
    if num_prompt_tokens >= longest:
        raise ValueError(f"the prompt has {num_prompt_tokens} tokens; this model's context of {longest} leaves no room")
    if wanted is not None and num_prompt_tokens + wanted > longest:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {wanted}; together they exceed the context "
            f"of {longest} tokens"
        )
    return longest - num_prompt_tokens if wanted is None else wanted
