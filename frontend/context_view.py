"""The context as it will be sent: system prompt, separators, chunks in their order, each with its tokens.

Texts are escaped: a chunk is shown letter for letter, whatever markup is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from boundaries import ChunkSpan, chunk_spans, common_prefix
from chat_session import ChatSession
from history import Context
from kvarena.context import build_messages

NUM_SHADES = 6


@dataclass(frozen=True)
class TokenCount:
    """Of a context without a question. `spans` has one entry per chunk."""

    total: int
    spans: tuple[ChunkSpan, ...]


def count_context(session: ChatSession, context: Context) -> TokenCount:
    """Counts with the contender's own tokenizer. Raises `ContenderError`."""
    prompt = session.prompt_ids(build_messages(context.system, context.texts, "", context.separator))
    if not context.chunks:
        return TokenCount(len(prompt), ())
    bare = session.prompt_ids(build_messages(context.system, [], "", ""))
    chunks = [session.text_ids(text) for text in context.texts]
    spans = chunk_spans(prompt, chunks, start=common_prefix(prompt, bare))
    return TokenCount(len(prompt), tuple(spans))


def summary(context: Context, count: TokenCount | None) -> str:
    chunks = f"{len(context.chunks)} chunk{'' if len(context.chunks) == 1 else 's'}"
    return f"Context: {chunks}, {count.total:,} tokens" if count else f"Context: {chunks}"


def context_html(context: Context, count: TokenCount | None) -> str:
    spans: Sequence[ChunkSpan | None] = count.spans if count else [None] * len(context.chunks)
    blocks = [
        _chunk_html(index, chunk.name, chunk.text, span)
        for index, (chunk, span) in enumerate(zip(context.chunks, spans, strict=True))
    ]
    separator = f'<div class="ka-separator">{escape(_visible(context.separator))}</div>'
    body = separator + separator.join(blocks) + separator if blocks else ""
    system = f'<div class="ka-system"><b>system</b>{escape(context.system)}</div>'
    question = '<div class="ka-system"><b>user</b><i>your question comes here</i></div>'
    return f'<div class="ka-context" data-testid="context">{system if context.system else ""}{body}{question}</div>'


def _chunk_html(index: int, name: str, text: str, span: ChunkSpan | None) -> str:
    return (
        f'<div class="ka-chunk ka-shade-{index % NUM_SHADES}" data-testid="chunk" '
        f'data-chunk="{escape(name)}"><div class="ka-chunk-head"><b>{index + 1}</b> {escape(name)}'
        f'<span data-testid="chunk-tokens">{_span_text(span)}</span></div>'
        f'<div class="ka-text">{escape(text)}</div></div>'
    )


def _span_text(span: ChunkSpan | None) -> str:
    if span is None:
        return ""
    tokens = f"{span.num_tokens:,} tokens"
    return tokens if span.start is None else f"{tokens} · {span.start:,} to {span.end:,}"


def _visible(separator: str) -> str:
    """White space at the ends of a separator counts, so it is made visible."""
    return separator.replace(" ", "␣").replace("\n", "⏎") or "(no separator)"
