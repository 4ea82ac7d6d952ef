"""Tokens for people: a prompt's, coloured by where their KV came from; an answer's, by their probability; and where two
answers differ. Data and HTML only. Texts are escaped.
"""

from __future__ import annotations

import codecs
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import lru_cache
from html import escape
from itertools import groupby, takewhile
from typing import Any

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + rank): byte for rank, byte in enumerate(b for b in range(256) if b not in _PRINTABLE)
}
"""The letters that stand for bytes in the vocabulary of a byte-level BPE, as in GPT-2's."""
_SPACE = "▁"  # in SentencePiece's vocabularies


def token_texts(names: Sequence[str]) -> list[str]:
    """The texts of tokens by their names in the vocabulary. A letter made of several tokens goes with the last."""
    if any(_SPACE in name for name in names):
        return [name.replace(_SPACE, " ") for name in names]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [
        decoder.decode(bytes(_BYTES[letter] for letter in name)) if all(letter in _BYTES for letter in name) else name
        for name in names
    ]


KINDS = {
    "prefix": "from the prefix cache: exact",
    "reused": "reused",
    "recomputed": "recomputed",
    "computed": "computed",
}


@dataclass(frozen=True)
class Span:
    """Prompt tokens `[start, end)` and where their KV came from, one of `KINDS`."""

    start: int
    end: int
    source: str


def kinds_of(num_tokens: int, spans: Sequence[Span]) -> list[str]:
    """The kind of each token, empty if no span has it; later spans cover earlier ones."""
    kinds = [""] * num_tokens
    for span in spans:
        kinds[span.start : span.end] = [span.source] * (min(span.end, num_tokens) - span.start)
    return kinds


@dataclass(frozen=True)
class TokenScores:
    """What recomputed tokens were chosen by: `what` names it, `scores` is by position, and `seen_from`, if the policy
    knows it, is the position that attends to the token most. `leans_on` is the span of the other chunk that a token
    attends to most, by position, `leaning` the share of its attention, which `what_leaning` names.
    """

    what: str = ""
    scores: Mapping[int, float] = field(default_factory=dict)
    seen_from: Mapping[int, int] = field(default_factory=dict)
    what_leaning: str = ""
    leans_on: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    leaning: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def read(cls, report: Mapping[str, Any]) -> TokenScores:
        told, leans_on = report.get("token_scores") or {}, report.get("leans_on") or {}
        tokens, leaning = told.get("tokens") or (), leans_on.get("tokens") or ()
        return cls(
            told.get("what") or "",
            {at: score for at, score, *_ in tokens},
            {at: source for at, _, *sources in tokens for source in sources},
            leans_on.get("what") or "",
            {at: (start, end) for at, start, end, _ in leaning},
            {at: share for at, *_, share in leaning},
        )

    def told(self, at: int, tokens: Sequence[str], name_of: Callable[[int], str]) -> str:
        """In a line or two; empty if nothing is known. `name_of` gives the name of the chunk at a position."""
        lines = []
        if at in self.scores:
            source = self.seen_from.get(at)
            looked = f", most from “{tokens[source].strip()}”" if source is not None and source < len(tokens) else ""
            lines.append(f"{self.what}: {self.scores[at]:.4g}{looked}")
        if at in self.leans_on:
            start, end = self.leans_on[at]
            name = name_of((start + end) // 2) or f"tokens {start:,} to {end:,}"
            lines.append(f"leans on {name}: {self.leaning[at]:.1%}, {self.what_leaning}")
        return "".join(f"\n{line}" for line in lines)


NO_SCORES = TokenScores()


def legend_html(entries: Iterable[tuple[str, str]]) -> str:
    """The entries of a legend, from the class of each colour and its text."""
    return "".join(f'<span class="ka-key"><i class="ka-{kind}"></i>{escape(text)}</span>' for kind, text in entries)


def tokens_html(
    title: str,
    tokens: Sequence[str],
    kinds: Sequence[str],
    chunks: Sequence[tuple[int, str]],
    scores: TokenScores = NO_SCORES,
) -> str:
    """A prompt's text. `chunks` has the position of each chunk's start with its name, and of its end with an empty one,
    ascending. Pointing at a token, or clicking it, shows what is known of it.
    """
    starts = [start for start, _ in chunks]

    def name_of(at: int) -> str:
        return chunks[index][1] if (index := bisect_right(starts, at) - 1) >= 0 else ""

    def told(at: int) -> str:
        kind = ", ".join(filter(None, (KINDS.get(kinds[at]), name_of(at))))
        return f"token {at:,}" + (kind and f": {kind}") + scores.told(at, tokens, name_of)

    runs = []
    for kind, members in groupby(range(len(tokens)), key=lambda at: kinds[at]):
        cells = "".join(f'<u tabindex="-1" title="{escape(told(at))}">{_shown(tokens[at])}</u>' for at in members)
        runs.append(f'<span class="ka-token-{kind}" data-kind="{kind}">{cells}</span>')
    legend = legend_html((kind, f"{kinds.count(kind):,} {label}") for kind, label in KINDS.items() if kind in kinds)
    return (
        f'<b>{escape(title)}</b><div class="ka-legend">{legend}</div>'
        f'<div class="ka-tokens ka-text" data-testid="prompt-tokens">{"".join(runs)}</div>'
    )


def _shown(token: str) -> str:
    return escape(token).replace("\n", "↵\n")


# -- answers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerToken:
    """`alternatives`: the likeliest tokens at its place with their probabilities, usually including this one."""

    text: str
    probability: float
    alternatives: tuple[tuple[str, float], ...] = ()


def read_answer_tokens(text: str, logprobs: Sequence[Mapping[str, Any]]) -> tuple[AnswerToken, ...]:
    """OpenAI's entries, aligned with the answer's `text`, since servers leave out white space before a token. Without
    tokens after the text, such as the end of the sequence.
    """
    return tuple(_aligned(text, logprobs))


def _aligned(text: str, logprobs: Sequence[Mapping[str, Any]]) -> Iterator[AnswerToken]:
    at = 0
    for entry in logprobs:
        found = re.match(r"\s*?" + re.escape(entry["token"]), text[at:])
        if not found and not text[at:].strip():
            return
        shown = found.group() if found else entry["token"]
        at += len(shown) if found else 0
        others = tuple((one["token"], math.exp(one["logprob"])) for one in entry.get("top_logprobs") or ())
        yield AnswerToken(shown, math.exp(entry["logprob"]), others)


def answer_tokens_html(tokens: Sequence[AnswerToken]) -> str:
    """The less probable a token, the stronger its background. Without leading white space."""
    first = next((index for index, token in enumerate(tokens) if token.text.strip()), 0)
    return "".join(
        f'<u class="ka-p" style="--p:{1 - token.probability:.3f}" data-probability="{token.probability:.4f}" '
        f'title="{escape(_alternatives(token))}">{escape(token.text if index else token.text.lstrip())}</u>'
        for index, token in enumerate(tokens[first:])
    )


def _alternatives(token: AnswerToken) -> str:
    others = "".join(f"\n{probability:.1%} {text!r}" for text, probability in token.alternatives)
    return f"{token.probability:.1%}{others}"


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """How many members two sequences share from their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def first_difference(text: str, exact: str) -> int | None:
    """The number, from 1, of the first word that differs; None if none does."""
    ours, theirs = text.split(), exact.split()
    return None if ours == theirs else common_prefix(ours, theirs) + 1


def first_token_difference(tokens: Sequence[AnswerToken], exact: Sequence[AnswerToken]) -> int | None:
    """The number, from 1, of the first token that differs; None if none does, or tokens aren't known."""
    ours, theirs = [token.text for token in tokens], [token.text for token in exact]
    return None if not ours or not theirs or ours == theirs else common_prefix(ours, theirs) + 1


MIN_ALIKE = 0.5
"""Texts that are less alike share words only by chance."""


@lru_cache(maxsize=256)
def diff_html(text: str, exact: str) -> str:
    """The text with words marked that the exact answer doesn't have, and the exact answer's other words struck out.
    White space goes with the word before it, and doesn't count. Texts that diverge are shown as wholes from the first
    difference on.
    """
    ours, theirs = re.findall(r"\S+\s*", text), re.findall(r"\S+\s*", exact)
    parts = []
    for kind, a, b, c, d in _opcodes(exact.split(), text.split()):
        gone, own = escape("".join(theirs[a:b])), escape("".join(ours[c:d]))
        if kind == "equal":
            parts.append(own)
        else:
            parts.append((f"<del>{gone}</del>" if gone else "") + (f"<ins>{own}</ins>" if own else ""))
    return "".join(parts)


def _opcodes(theirs: Sequence[str], ours: Sequence[str]) -> list[tuple[str, int, int, int, int]]:
    """Like those of `SequenceMatcher`."""
    same = common_prefix(theirs, ours)
    rest = SequenceMatcher(None, theirs[same:], ours[same:], autojunk=False)
    if rest.ratio() < MIN_ALIKE:
        return [("equal", 0, same, 0, same), ("replace", same, len(theirs), same, len(ours))]
    after = [(kind, a + same, b + same, c + same, d + same) for kind, a, b, c, d in rest.get_opcodes()]
    return [("equal", 0, same, 0, same), *after]
