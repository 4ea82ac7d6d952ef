"""Where each chunk begins and ends in a prompt, in tokens.

The prompt's ids and each chunk's ids come from the server's own tokenizer. A chunk is looked up in the prompt in
order; since a tokenizer may join a chunk's edge with its neighbour, up to `MAX_EDGE` tokens at either end may differ
and are then counted as the chunk's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_EDGE = 3


@dataclass(frozen=True)
class ChunkSpan:
    """Tokens `[start, end)` of the prompt; both None where the chunk could not be found as it stands alone."""

    num_tokens: int
    start: int | None = None
    end: int | None = None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts share from their beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


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
    wanted = list(wanted)
    for at in range(start, len(prompt) - len(wanted) + 1):
        if prompt[at] == wanted[0] and list(prompt[at : at + len(wanted)]) == wanted:
            return at
    return None
