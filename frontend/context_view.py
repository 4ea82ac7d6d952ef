"""The context as it will be sent: system prompt, separators and chunks in order, each with its tokens.

The token ids of prompt and chunks come from the server's tokenizer. Each chunk is looked up in the prompt, in order. A
tokenizer may join a chunk's end with what is next to it, so up to `MAX_EDGE` tokens at either end may differ; they
count as the chunk's own. Texts are escaped: a chunk is shown letter for letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from chat import Context
from chat_session import ChatSession
from kvarena.documents import build_messages, without_separators
from tokens import common_prefix

MAX_EDGE = 3
MAX_ROLE_WORDS = 3
"""What a template without a system prompt begins with: the names of roles."""


@dataclass(frozen=True)
class ChunkSpan:
    """Tokens `[start, end)` of the prompt; both None if the chunk wasn't found in it."""

    num_tokens: int
    start: int | None = None
    end: int | None = None


def chunk_spans(prompt: Sequence[int], chunks: Sequence[Sequence[int]], start: int = 0) -> list[ChunkSpan]:
    """One span per chunk, in order, none before `start`."""
    spans = []
    cursor = start
    for chunk in chunks:
        found = _find_with_edges(prompt, chunk, cursor)
        if found is None:
            spans.append(ChunkSpan(len(chunk)))
            continue
        cursor = found + len(chunk)
        spans.append(ChunkSpan(len(chunk), found, cursor))
    return spans


def _find_with_edges(prompt: Sequence[int], chunk: Sequence[int], start: int) -> int | None:
    for edge in range(MAX_EDGE + 1):
        inner = chunk[edge : len(chunk) - edge]
        if len(inner) <= 2 * edge:
            return None
        found = _find(prompt, inner, start + edge)
        if found is not None:
            return found - edge
    return None


def _find(prompt: Sequence[int], wanted: Sequence[int], start: int) -> int | None:
    places = range(start, len(prompt) - len(wanted) + 1)
    return next((at for at in places if prompt[at] == wanted[0] and prompt[at : at + len(wanted)] == wanted), None)


NUM_SHADES = 6


@dataclass(frozen=True)
class TokenCount:
    """Of a context without a question. `spans` has one entry for each chunk. `template` is the system prompt that the
    model's chat template adds if the context has none; empty if it adds none.
    """

    total: int
    spans: tuple[ChunkSpan, ...]
    template: str = ""


def count_context(session: ChatSession, context: Context) -> TokenCount:
    """Counts with the contender's own tokenizer. Raises `ContenderError`."""
    prompt = session.prompt_ids(build_messages(context.system, context.texts, "", context.separator))
    template = "" if context.system else _own_system_prompt(session)
    if not context.chunks:
        return TokenCount(len(prompt), (), template)
    bare = session.prompt_ids(build_messages(context.system, [], "", ""))
    chunks = [session.text_ids(without_separators(text, context.separator)) for text in context.texts]
    spans = chunk_spans(prompt, chunks, start=common_prefix(prompt, bare))
    return TokenCount(len(prompt), tuple(spans), template)


def _own_system_prompt(session: ChatSession) -> str:
    """What stands before the first message, if it has words."""
    questions = [[{"role": "user", "content": text}] for text in ("", "?")]
    num_tokens = common_prefix(*map(session.prompt_ids, questions))
    head = "".join(session.prompt_tokens(questions[1])[:num_tokens]).strip()
    return head if len(re.sub(r"<[^>]*>", " ", head).split()) > MAX_ROLE_WORDS else ""


def num_fitting(count: TokenCount, limit: int) -> int:
    """How many of the chunks, from the first on, make a prompt of at most `limit` tokens."""
    sizes = [span.num_tokens for span in count.spans]
    dropped = 0
    while dropped < len(sizes) and count.total - sum(sizes[len(sizes) - dropped :]) > limit:
        dropped += 1
    return len(sizes) - dropped


def summary(context: Context, count: TokenCount | None, ratio: float | None = None) -> str:
    """`ratio` is the share of the chunks' tokens that is recomputed, if one was chosen."""
    chunks = f"Context: {len(context.chunks)} chunk{'' if len(context.chunks) == 1 else 's'}"
    if not count:
        return chunks
    recomputed = "" if ratio is None or not count.spans else f"; {_recomputed(count, ratio)}"
    return f"{chunks}, {count.total:,} tokens{recomputed}"


def _recomputed(count: TokenCount, ratio: float) -> str:
    total = _num_reused(count.spans)
    told = {0.0: "none", 1.0: "all"}.get(ratio, f"about {ratio * total:,.0f}")
    return f"a blend recomputes {told} of the chunks' {total:,}"


def _num_reused(spans: Sequence[ChunkSpan]) -> int:
    """With the separators between them, which belong to the chunks."""
    if spans[0].start is None or spans[-1].end is None:
        return sum(span.num_tokens for span in spans)
    return spans[-1].end - spans[0].start


def context_html(context: Context, count: TokenCount | None) -> str:
    spans: Sequence[ChunkSpan | None] = count.spans if count else [None] * len(context.chunks)
    blocks = [
        _chunk_html(index, chunk.name, chunk.text, span)
        for index, (chunk, span) in enumerate(zip(context.chunks, spans, strict=True))
    ]
    separator = f'<div class="ka-separator">{escape(_visible(context.separator))}</div>'
    body = separator + separator.join(blocks) + separator if blocks else ""
    system = f'<div class="ka-system"><b>system</b>{escape(context.system)}</div>' if context.system else ""
    if count and count.template:
        system = f'<div class="ka-system"><b>the model\'s own system prompt</b>{escape(count.template)}</div>'
    question = '<div class="ka-system"><b>user</b><i>your question comes here</i></div>'
    return f'<div class="ka-context" data-testid="context">{system}{body}{question}</div>'


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
    return tokens if span.start is None else f"{tokens} · positions {span.start:,} to {span.end:,}"


def _visible(separator: str) -> str:
    """Makes the white space of a separator visible, since it counts."""
    return separator.replace(" ", "␣").replace("\n", "⏎") or "(no separator)"
