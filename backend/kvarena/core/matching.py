"""From a prompt's token ids to its reuse plan.

Two sources. Known chunks are found wherever they stand, by rsync's idea (Tridgell and Mackerras 1996): a chunk is
indexed by the hash of its windows at multiples of `window`, a prompt is hashed at every position, and a hit is
extended both ways. A hash hit only nominates: tokens are always compared. Segments are ranges that the client
marked, by a separator string or by naming the texts. A separator tokenises differently in different surroundings
(LMCache issues 1136, 2639), so it is looked for in the text of the tokens. A segment that is not known yet is
planned too: its KV is computed once, after the model's sink, and stored.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvarena.core.plan import NO_SINK, Chunk, ChunkKey, ReusePlan, Span, TokenIds, as_token_ids

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


class ChunkIndex:
    """The known chunks of every salt, bounded by their number of tokens; the least recently used one goes first.

    Three limits keep matching linear in the prompt. Of the places where a window is known, the last `max_candidates`
    are compared. A window that led to no span `max_failures` times is text that is everywhere (a record's field names,
    say), and is ignored in the rest of the prompt. And beyond the first `FREE_COMPARISONS` there is at most one
    comparison for every two tokens. `num_comparisons` counts them over the index's life.

    Not thread-safe: it belongs to one scheduler.
    """

    FREE_COMPARISONS = 1024

    def __init__(
        self, *, window: int = 16, max_tokens: int = 4_000_000, max_candidates: int = 16, max_failures: int = 8
    ) -> None:
        self.window = window
        self.max_tokens = max_tokens
        self.max_candidates = max_candidates
        self.max_failures = max_failures
        self.num_tokens = 0
        self.num_comparisons = 0
        self._chunks: OrderedDict[ChunkKey, Chunk] = OrderedDict()
        self._windows: dict[str, dict[int, dict[tuple[ChunkKey, int], None]]] = defaultdict(dict)
        """By salt and hash, where each window stands, in the order of adding; removing one looks at no other."""

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks.values())

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk.key in self._chunks

    def touch(self, chunk: Chunk) -> bool:
        """Whether the chunk is known; it then counts as just used."""
        if chunk.key not in self._chunks:
            return False
        self._chunks.move_to_end(chunk.key)
        return True

    def add(self, chunk: Chunk) -> list[Chunk]:
        """Make a chunk known. Returns the chunks that had to go for it. One larger than the bound isn't taken."""
        if self.touch(chunk) or not 0 < len(chunk) <= self.max_tokens:
            return []
        self._chunks[chunk.key] = chunk
        self.num_tokens += len(chunk)
        windows = self._windows[chunk.salt]
        for offset, value in self._chunk_windows(chunk):
            windows.setdefault(value, {})[chunk.key, offset] = None
        dropped = []
        while self.num_tokens > self.max_tokens:
            dropped.append(next(iter(self._chunks.values())))
            self.remove(dropped[-1])
        return dropped

    def remove(self, chunk: Chunk) -> None:
        if self._chunks.pop(chunk.key, None) is None:
            return
        self.num_tokens -= len(chunk)
        windows = self._windows[chunk.salt]
        for offset, value in self._chunk_windows(chunk):
            del windows[value][chunk.key, offset]
            if not windows[value]:
                del windows[value]
        if not windows:
            del self._windows[chunk.salt]

    def match(self, token_ids: TokenIds, salt: str = "", *, min_tokens: int = 32) -> list[Span]:
        """Known chunks of `salt` in the prompt, left to right and without overlap.

        A match shorter than `min_tokens` counts only when it is a whole chunk.
        """
        spans: list[Span] = []
        end = 0
        failures: Counter[int] = Counter()
        before = self.num_comparisons
        for position, value in self._hits(token_ids, salt):
            spent = self.num_comparisons - before - self.FREE_COMPARISONS
            if position < end or failures[value] >= self.max_failures or spent > position // 2:
                continue
            span = self._longest_match(token_ids, salt, position, value, end, min_tokens)
            if span:
                self._chunks.move_to_end(span.chunk.key)
                spans.append(span)
                end = span.end
            else:
                failures[value] += 1
        return spans

    def check_integrity(self) -> None:
        """Compare every derived figure with the chunks themselves. Raises `AssertionError`."""
        assert self.num_tokens == sum(map(len, self._chunks.values())) <= self.max_tokens
        expected = sorted(
            (chunk.salt, value, key, offset)
            for key, chunk in self._chunks.items()
            for offset, value in self._chunk_windows(chunk)
        )
        found = sorted(
            (salt, value, key, offset)
            for salt, windows in self._windows.items()
            for value, places in windows.items()
            for key, offset in places
        )
        assert expected == found, "windows and chunks disagree"

    def _chunk_windows(self, chunk: Chunk) -> list[tuple[int, int]]:
        hashes = window_hashes(chunk.token_ids, self.window)
        return [(offset, int(hashes[offset])) for offset in range(0, len(hashes), self.window)]

    def _hits(self, token_ids: TokenIds, salt: str) -> Iterator[tuple[int, int]]:
        """Positions of the prompt at which a known window stands, with the window's hash."""
        windows = self._windows.get(salt)
        if windows:
            for position, value in enumerate(window_hashes(token_ids, self.window).tolist()):
                if value in windows:
                    yield position, value

    def _longest_match(
        self, token_ids: TokenIds, salt: str, position: int, value: int, low: int, min_tokens: int
    ) -> Span | None:
        best: Span | None = None
        latest = list(itertools.islice(reversed(self._windows[salt][value]), self.max_candidates))
        for key, offset in reversed(latest):
            self.num_comparisons += 1
            span = _extend(token_ids, self._chunks[key], position, offset, low, self.window)
            counts = span and (len(span) >= min_tokens or span.is_whole_chunk)
            if span and counts and (best is None or len(span) > len(best)):
                best = span
        return best


def window_hashes(token_ids: TokenIds, window: int) -> npt.NDArray[np.uint64]:
    """A polynomial hash modulo 2^64 of every window of `window` tokens; empty for a shorter text."""
    count = len(token_ids) - window + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    mixed = (token_ids.astype(np.uint64) + np.uint64(1)) * _MIX
    mixed ^= mixed >> np.uint64(29)
    hashes = np.zeros(count, np.uint64)
    for i in range(window):
        hashes = hashes * _MULTIPLIER + mixed[i : i + count]
    return hashes


def _extend(token_ids: TokenIds, chunk: Chunk, position: int, offset: int, low: int, window: int) -> Span | None:
    """The longest run around a hit in which prompt and chunk agree, not reaching below `low`; None if they don't."""
    ids = chunk.token_ids
    if not np.array_equal(token_ids[position : position + window], ids[offset : offset + window]):
        return None
    start = position - _num_equal(token_ids[low:position][::-1], ids[:offset][::-1])
    end = position + _num_equal(token_ids[position:], ids[offset:])
    return Span(start, end, chunk, offset - (position - start))


def _num_equal(one: TokenIds, other: TokenIds) -> int:
    """The length of their common prefix. The work grows with that, not with the length of the texts."""
    length = min(len(one), len(other))
    begin, step = 0, 32
    while begin < length:
        end = min(begin + step, length)
        differs = one[begin:end] != other[begin:end]
        if differs.any():
            return begin + int(np.argmax(differs))
        begin, step = end, 4 * step
    return length


Segment = tuple[int, int]


@dataclass(frozen=True)
class Planner:
    """Plans over one index.

    `min_chunk_tokens`: shorter segments are not worth a chunk. `min_match_tokens`: shorter partial matches are not
    worth a span. `min_coverage`: a segment covered by known chunks to at least this share isn't made a chunk itself.
    `min_reused_ratio`, `max_joined_tokens`: see `blend_end`. `sink`: what new chunks are computed after, unless they
    begin with it themselves, as a system prompt does with what the template puts before it.
    """

    index: ChunkIndex
    min_chunk_tokens: int = 16
    min_match_tokens: int = 32
    min_coverage: float = 0.5
    min_reused_ratio: float = 0.5
    max_joined_tokens: int = 128
    sink: TokenIds = field(default_factory=lambda: NO_SINK)

    def plan(self, token_ids: TokenIds, segments: Sequence[Segment] = (), salt: str = "") -> ReusePlan:
        """The plan of a prompt. `segments` must be in order and without overlap. Changes nothing but recency."""
        matches = ReusePlan(tuple(self.index.match(token_ids, salt, min_tokens=self.min_match_tokens)))
        spans: list[Span] = []
        position = 0
        for start, end in segments:
            spans += matches.clipped(position, start)
            spans += self._plan_segment(token_ids, start, end, salt, matches)
            position = end
        spans += matches.clipped(position, len(token_ids))
        long_enough = (span for span in spans if len(span) >= self.min_chunk_tokens)
        return ReusePlan(tuple(self._placed(span, token_ids) for span in long_enough))

    def seams(self, plan: ReusePlan, token_ids: TokenIds) -> dict[int, Span]:
        """What may stand for spans of a prompt's plan, by their starts: their chunks as computed after the chunk that
        is just before them here. That is a chunk of its own, whose sink is all the text that it was computed after.
        """
        found = {}
        for before, span in itertools.pairwise(plan):
            sink = before.chunk.after_sink
            is_seam = before.end == span.start and before.is_whole_chunk and span.is_whole_chunk and not span.is_exact
            if is_seam and len(sink) <= MAX_SEAM_TOKENS:
                found[span.start] = self._placed(replace(span, chunk=replace(span.chunk, sink=sink)), token_ids)
        return found

    def blend_end(self, plan: ReusePlan, start: int, last: int, *, recomputes_none: bool = False) -> int:
        """Where the blend of a prompt from `start` on ends; `start` where there is none. `last` is the prompt's last
        token, which has to give the logits.

        It is the end of the last span up to which most tokens are reused; what follows is cheaper as plain prefill. A
        short rest, the question, joins a blend that runs the model anyway: over tokens that no span covers, or, unless
        `recomputes_none`, over reused ones that aren't exact.
        """
        spans = plan.clipped(start, last).spans
        reused = sum(map(len, spans))
        for span in reversed(spans):
            if reused >= max(self.min_reused_ratio * (span.end - start), self.min_chunk_tokens):
                blended = plan.clipped(start, span.end)
                has_forward = bool(blended.gaps(start, span.end)) or not (recomputes_none or blended.is_prefix)
                return last if has_forward and last - span.end <= self.max_joined_tokens else span.end
            reused -= len(span)
        return start

    def _plan_segment(self, token_ids: TokenIds, start: int, end: int, salt: str, matches: ReusePlan) -> Sequence[Span]:
        chunk = Chunk(token_ids[start:end].copy(), salt, sink_of(token_ids[start:end], self.sink))
        if len(chunk) < self.min_chunk_tokens:
            return ()
        found = matches.clipped(start, end)
        if not self.index.touch(chunk) and found.num_reused_tokens >= self.min_coverage * len(chunk):
            return found.spans
        return (Span(start, end, chunk),)

    def _placed(self, span: Span, token_ids: TokenIds) -> Span:
        sink = span.chunk.sink
        is_next = len(sink) > 0 and span.offset == 0 and span.start == len(sink)
        return replace(span, follows_sink=is_next and np.array_equal(token_ids[: len(sink)], sink))


def sink_of(token_ids: TokenIds, sink: TokenIds) -> TokenIds:
    """The sink that a text's KV is computed after: none for a text that begins with it."""
    return NO_SINK if np.array_equal(token_ids[: len(sink)], sink) else sink


_TEXT_WINDOW = 8


class _TokenText:
    """A token's text as it reads after another one: decoders drop the white space that opens a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = encode_alone(tokenizer, "a")[-1:]
        self._anchor_length = len(self._decode(self._anchor))
        self._texts: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.of([token])
        return self._texts[token]

    def of(self, tokens: list[int]) -> str:
        return self._decode([*self._anchor, *tokens])[self._anchor_length :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _SeparatorFinder:
    """Finds a separator, which isn't only white space, in token ids. `vocabulary` are the tokens' raw forms by id, used
    to skip every stretch of the prompt that can't hold it. Raises `ValueError` for a separator that isn't ASCII: a
    token may then carry part of a character.
    """

    def __init__(self, separator: str, token_text: _TokenText, vocabulary: Sequence[str | None]) -> None:
        if not separator.isascii():
            raise ValueError(f"separator must be ASCII, not {separator!r}")
        self._core = separator.strip()
        self._needs_space_before = separator[:1].isspace()
        self._needs_space_after = separator[-1:].isspace()
        self._token_text = token_text
        characters = {character for character in self._core if not character.isspace()}
        may_hold = (token is None or not characters.isdisjoint(token) for token in vocabulary)
        self._may_hold = np.array([*may_hold, True])
        """Which tokens may hold a part of it: raw forms spell ASCII as itself. The last entry is for all higher ids."""

    def segments(self, token_ids: TokenIds) -> list[Segment]:
        """What stands before the first separator, and each separator with what follows it up to the next one.

        The separator is part of the chunk after it: the first token of a text computed alone draws attention that it
        doesn't deserve, so it had better mean nothing. After the last separator is the question, which is no segment.
        """
        ranges = self._candidate_ranges(token_ids)
        found = itertools.chain.from_iterable(self._find_in(token_ids, low, high) for low, high in ranges)
        starts = [0, *(start for start, _ in found)]
        return [(start, end) for start, end in itertools.pairwise(starts) if start < end]

    def begins_inside(self, token_ids: TokenIds, position: int) -> bool:
        """Whether the token in which a separator begins has other text before it."""
        text = self._token_text(int(token_ids[position]))
        size = len(self._core)
        at = next((at for at in range(len(text)) if self._core.startswith(text[at : at + size])), 0)
        return bool(text[:at].strip())

    def _candidate_ranges(self, token_ids: TokenIds) -> Iterable[Segment]:
        """Ranges around tokens that share a character with the separator, one more token on each side."""
        inside = np.minimum(token_ids, len(self._may_hold) - 1)
        hits = np.flatnonzero(self._may_hold[inside])
        if not len(hits):
            return
        breaks = np.flatnonzero(np.diff(hits) > len(self._core))
        for first, last in zip(hits[np.r_[0, breaks + 1]], hits[np.r_[breaks, len(hits) - 1]], strict=True):
            yield max(0, int(first) - 1), min(len(token_ids), int(last) + 2)

    def _find_in(self, token_ids: TokenIds, start: int, end: int) -> list[Segment]:
        """The tokens of this range that carry the separator, in order."""
        texts = [self._token_text(int(token)) for token in token_ids[start:end]]
        text = "".join(texts)
        ends = np.cumsum([len(piece) for piece in texts])
        found: list[Segment] = []
        at = text.find(self._core)
        while at >= 0:
            stop = at + len(self._core)
            if self._has_its_space(text, at, stop):
                first = int(np.searchsorted(ends, at, side="right"))
                last = int(np.searchsorted(ends, stop, side="left"))
                found.append((start + first, start + last + 1))
                at = text.find(self._core, stop)
            else:
                at = text.find(self._core, at + 1)
        return [segment for i, segment in enumerate(found) if i == 0 or found[i - 1][1] <= segment[0]]

    def _has_its_space(self, text: str, at: int, stop: int) -> bool:
        before, after = text[at - 1 : at] if at else "", text[stop : stop + 1]
        return not (self._needs_space_before and before and not before.isspace()) and not (
            self._needs_space_after and after and not after.isspace()
        )


def text_segments(token_ids: TokenIds, texts: Sequence[TokenIds]) -> list[Segment]:
    """Where texts that were tokenised alone are in a prompt, without ends that tokenise differently there.

    A text of which less than half is found in one piece isn't in the prompt.
    """
    index = ChunkIndex(window=_TEXT_WINDOW)
    for ids in texts:
        if len(ids) <= 2 * len(token_ids):
            index.add(Chunk(ids))
    spans = index.match(token_ids, min_tokens=_TEXT_WINDOW)
    return [(span.start, span.end) for span in spans if 2 * len(span) >= len(span.chunk)]


class Segmenter:
    """Finds what a client marks as chunks, with the served model's tokenizer; nothing where the server has none."""

    def __init__(self, tokenizer: Any, separator: str) -> None:
        self._tokenizer = tokenizer
        self._finder: _SeparatorFinder | None = None
        if tokenizer is not None and separator.strip():
            vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
            self._finder = _SeparatorFinder(separator, self._token_text, vocabulary)

    @cached_property
    def _token_text(self) -> _TokenText:
        return _TokenText(self._tokenizer)

    def segments(self, token_ids: TokenIds, named: Sequence[str | Sequence[int]] = ()) -> list[Segment]:
        """Those of the `named` texts (or their token ids); without any, those between separators."""
        if named and self._tokenizer is not None:
            ids = (encode_alone(self._tokenizer, chunk) if isinstance(chunk, str) else chunk for chunk in named)
            return text_segments(token_ids, list(map(as_token_ids, ids)))
        return self._finder.segments(token_ids) if self._finder else []

    def texts(self, named: Sequence[str | Sequence[int]]) -> frozenset[str]:
        """What `is_cut` compares with: texts without white space around them."""
        if self._tokenizer is None:
            return frozenset()
        texts = (chunk if isinstance(chunk, str) else self._token_text.of(list(chunk)) for chunk in named)
        return frozenset(text.strip() for text in texts)

    def is_cut(self, token_ids: TokenIds, start: int, end: int, texts: Collection[str] = ()) -> bool:
        """Whether a segment begins or ends inside a token, so that its text has other tokens elsewhere."""
        if texts and self._tokenizer is not None:
            return self._token_text.of(token_ids[start:end].tolist()).strip() not in texts
        edges = [edge for edge in (start, end) if 0 < edge < len(token_ids)]
        return self._finder is not None and any(self._finder.begins_inside(token_ids, edge) for edge in edges)


def encode_alone(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text that stands by itself."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


DEFAULT_SINK_TOKENS = 1
MAX_SEAM_TOKENS = 4096
"""A seam is computed by running all that is before it; after more than this there is none."""
MAX_SINK_TOKENS = 256


def prompt_beginning(tokenizer: Any, num_tokens: int) -> TokenIds:
    """A model's sink: at most `num_tokens` of the tokens that all its chat prompts begin with.

    They come from its chat template; without one it is the beginning-of-text token, if there is one.
    """
    if tokenizer is None or not num_tokens:
        return NO_SINK
    user, system = {"role": "user", "content": "1"}, {"role": "system", "content": "2"}
    prompts = [_rendered(tokenizer, messages) for messages in ([user], [{**user, "content": "3"}], [system, user])]
    one, *others = [prompt for prompt in prompts if len(prompt)] or [as_token_ids([])]
    shared = min((_num_equal(one, other) for other in others), default=0)
    begin = getattr(tokenizer, "bos_token_id", None)
    ids = one[:shared] if shared else as_token_ids([] if begin is None else [begin])
    return ids[:num_tokens]


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> TokenIds:
    """Empty where there is no template, or it refuses these roles."""
    try:
        return as_token_ids(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    except Exception:  # a template may raise whatever its author likes
        return as_token_ids([])
