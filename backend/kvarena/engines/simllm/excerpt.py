"""A long prompt cut to what a person wants to see of it: how it begins, and the question at its end."""

from __future__ import annotations

from kvarena.api.tokenizer import Tokenizer
from kvarena.reuse.plan import TokenIds

NUM_FIRST_TOKENS = 200
NUM_LAST_TOKENS = 150


def excerpt(token_ids: TokenIds, tokenizer: Tokenizer) -> str:
    """The text of these tokens; of a long one the beginning and the end, and how many tokens stand between."""
    num_between = len(token_ids) - NUM_FIRST_TOKENS - NUM_LAST_TOKENS
    if num_between <= 0:
        return tokenizer.decode(token_ids.tolist())
    first, last = token_ids[:NUM_FIRST_TOKENS].tolist(), token_ids[-NUM_LAST_TOKENS:].tolist()
    return f"{tokenizer.decode(first)}\n[... {num_between:,} tokens ...]\n{tokenizer.decode(last)}"
