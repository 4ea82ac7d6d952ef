"""Small charts as HTML, without a library: what a prompt's tokens cost, and where in the prompt they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from figures import Figures, Span


@dataclass(frozen=True)
class Part:
    """`kind` is the CSS class that colours the part."""

    kind: str
    label: str
    num_tokens: int


def token_parts(figures: Figures) -> list[Part]:
    """The prompt's tokens by cost, without the empty kinds; empty when the server didn't say."""
    counts = (
        figures.num_reused_tokens,
        figures.num_recomputed_tokens,
        figures.num_computed_tokens,
    )
    if any(count is None for count in counts):
        return []
    reused, recomputed, computed = (count or 0 for count in counts)
    prefix = min(figures.num_prefix_tokens or 0, reused)
    parts = [
        Part("prefix", "prefix cache", prefix),
        Part("reused", "reused", reused - prefix),
        Part("recomputed", "recomputed", recomputed),
        Part("computed", "computed", computed),
    ]
    return [part for part in parts if part.num_tokens > 0]


def token_bar(figures: Figures) -> str:
    """A stacked bar of `token_parts` with its legend, and below it where in the prompt they stand."""
    parts = token_parts(figures)
    total = sum(part.num_tokens for part in parts)
    if not total:
        return ""
    cells = "".join(
        f'<span class="ka-part ka-{part.kind}" style="width:{100 * part.num_tokens / total:.3f}%" '
        f'title="{part.num_tokens:,} tokens {part.label}"></span>'
        for part in parts
    )
    legend = "".join(
        f'<span class="ka-key"><i class="ka-{part.kind}"></i>{part.num_tokens:,} {part.label}</span>' for part in parts
    )
    return (
        f'<div class="ka-bar" data-testid="token-bar">{cells}</div>'
        f"{_strip(figures.spans)}"
        f'<div class="ka-legend">{legend}</div>'
    )


def _strip(spans: Sequence[Span]) -> str:
    total = max((span.end for span in spans), default=0)
    if not total or not any(span.source == "reused" for span in spans):
        return ""
    cells = "".join(
        f'<span class="ka-part ka-{span.source}" style="left:{100 * span.start / total:.3f}%;'
        f'width:{100 * (span.end - span.start) / total:.3f}%" '
        f'title="tokens {span.start:,} to {span.end:,}: {span.source}"></span>'
        for span in spans
        if span.source in ("prefix", "reused", "computed")
    )
    return f'<div class="ka-strip" data-testid="span-strip">{cells}</div>'
