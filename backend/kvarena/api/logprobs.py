"""Logprobs in the two forms that OpenAI has for them. Infinite ones, which JSON can't say, are written as -9999."""

from __future__ import annotations

from collections.abc import Sequence

from kvarena.api.engine import GeneratedToken
from kvarena.api.response_models import ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob
from kvarena.api.token_texts import TokenTexts

_LOWEST = -9999.0


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
    """`top_logprobs` has the drawn token in addition, where it isn't among the most likely."""
    names = [texts.text(token.token_id) for token in tokens]
    tops = [{texts.text(token_id): _finite(logprob) for token_id, logprob in reversed(t.top)} for t in tokens]
    for name, top, token in zip(names, tops, tokens, strict=True):
        top.setdefault(name, _finite(token.logprob))
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
    return logprob if logprob is not None and logprob > _LOWEST else _LOWEST
