"""The prefix cache: a radix tree of KV under a byte budget, shared by many requests at once.

```
lease = cache.acquire(token_ids)     # waits when another request computes what this one could take over
lease.segments, lease.tail           # what is known of the beginning, pinned until the lease is closed
lease.insert(segment, tail)          # what was computed for the rest
lease.close()
```

Least recently used leaves go first; what a lease stands on stays. A prefix shorter than `min_tokens` counts as a miss.
With `max_entries` or `max_age_seconds` the number of whole prefixes and their age are bounded, too, as in the
demonstration that this contender began with; KV doesn't go stale, so by default it is memory alone that ends it.
Tenants are told apart by their salt: each has a tree of its own, all share the budget. The tree itself knows no locks,
budget or eviction, and its payloads are generic, so that it can be tested without tensors.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

TokenIds = tuple[int, ...]


class Segment(Protocol):
    """What is kept for a run of tokens, such as their KV. Never changed once it is in a tree."""

    @property
    def num_bytes(self) -> int: ...

    def __len__(self) -> int:
        """How many tokens."""

    def slice(self, start: int, end: int) -> Self:
        """The part `[start, end)`, as a view: it lives no longer than the whole is wanted."""

    def copy(self) -> Self:
        """The same in memory of its own, where the tree keeps its payloads."""


class Tail(Protocol):
    """What is kept for the place after a run of tokens, such as the logits there."""

    @property
    def num_bytes(self) -> int: ...

    def copy(self) -> Self: ...


S = TypeVar("S", bound=Segment)
T = TypeVar("T", bound=Tail)


@dataclass(eq=False)
class Node(Generic[S, T]):
    """The tokens of the edge from its parent, what is kept for them, and for the place after them.

    `num_pins` counts the leases on this node or on one below it; only a node without any may be evicted. `kept_s` is
    when something was kept here or below, by the cache's clock, so that nothing stands on what is older.
    """

    tokens: TokenIds = ()
    segment: S | None = None
    tail: T | None = None
    parent: Node[S, T] | None = None
    children: dict[int, Node[S, T]] = field(default_factory=dict)
    num_pins: int = 0
    last_used: int = 0
    kept_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        segment = self.segment.num_bytes if self.segment is not None else 0
        return segment + (self.tail.num_bytes if self.tail is not None else 0)

    def path(self) -> Iterator[Node[S, T]]:
        """This node and those above it, without the root."""
        node: Node[S, T] | None = self
        while node is not None and node.parent is not None:
            yield node
            node = node.parent

    def below(self) -> Iterator[Node[S, T]]:
        """Every node below this one."""
        waiting = list(self.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())


@dataclass(eq=False)
class Root(Node[S, T]):
    """The top of one tenant's tree; no tokens of its own."""

    salt: str = ""


@dataclass(frozen=True)
class Match(Generic[S, T]):
    """The longest known beginning of a sequence: `num_tokens` of it, the last `num_in_node` of them in `node`."""

    node: Node[S, T]
    num_in_node: int
    num_tokens: int

    @property
    def is_whole_node(self) -> bool:
        return self.num_in_node == len(self.node.tokens)

    @property
    def tail(self) -> T | None:
        return self.node.tail if self.is_whole_node else None

    def segments(self) -> list[S]:
        """What is kept for the matched tokens, in order; the last one may be a view."""
        nodes = list(self.node.path())[::-1]
        segments = [node.segment for node in nodes]
        assert all(segment is not None for segment in segments), "only the root has no segment"
        if nodes and not self.is_whole_node and segments[-1] is not None:
            segments[-1] = segments[-1].slice(0, self.num_in_node)
        return [segment for segment in segments if segment is not None]


def find_longest(root: Node[S, T], token_ids: Sequence[int]) -> Match[S, T]:
    node, num_tokens = root, 0
    while num_tokens < len(token_ids):
        child = node.children.get(token_ids[num_tokens])
        if child is None:
            break
        num_common = common_length(child.tokens, token_ids, num_tokens)
        num_tokens += num_common
        node = child
        if num_common < len(child.tokens):
            return Match(node, num_common, num_tokens)
    return Match(node, len(node.tokens), num_tokens)


def common_length(tokens: Sequence[int], token_ids: Sequence[int], start: int = 0) -> int:
    """How many of `tokens` stand in `token_ids` from `start` on."""
    most = min(len(tokens), len(token_ids) - start)
    if tuple(tokens[:most]) == tuple(token_ids[start : start + most]):
        return most
    return next(i for i in range(most) if tokens[i] != token_ids[start + i])


def split(node: Node[S, T], at: int) -> Node[S, T]:
    """Makes a node of the first `at` tokens above `node`, which keeps the rest. Both get memory of their own."""
    assert 0 < at < len(node.tokens), f"a node of {len(node.tokens)} tokens can't be split at {at}"
    assert node.parent is not None
    assert node.segment is not None
    upper = Node(
        tokens=node.tokens[:at],
        segment=node.segment.slice(0, at).copy(),
        parent=node.parent,
        children={node.tokens[at]: node},
        num_pins=node.num_pins,
        last_used=node.last_used,
        kept_s=node.kept_s,
    )
    node.parent.children[node.tokens[0]] = upper
    node.segment = node.segment.slice(at, len(node.tokens)).copy()
    node.tokens = node.tokens[at:]
    node.parent = upper
    return upper


MIN_TOKENS = 20
CAPACITY_BYTES = 2**30


@dataclass(frozen=True)
class PrefixEntry(Generic[S, T]):
    """What is known of a sequence's first `num_tokens` tokens. `last_logits` are those after them, where kept."""

    num_tokens: int
    past_key_values: tuple[S, ...]
    last_logits: T | None


@dataclass(frozen=True)
class PrefixCacheStats:
    """Counts since the cache was made; `cache_size` is the number of places whose tail is kept: whole prefixes.
    `evictions` made room, `expirations` were too old.
    """

    cache_size: int
    num_nodes: int
    num_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    evictions: int
    expirations: int
    tokens_saved: int
    waits: int
    total_requests: int
    hit_rate: float


class Lease(Generic[S, T]):
    """One request's hold on the cache. Used by one thread; `close` may be called more than once."""

    def __init__(self, cache: PrefixCache[S, T], token_ids: TokenIds, salt: str, match: Match[S, T] | None) -> None:
        self.token_ids = token_ids
        self.salt = salt
        self.num_tokens = match.num_tokens if match else 0
        self.segments: list[S] = match.segments() if match else []
        self.tail: T | None = match.tail if match else None
        self.pinned: Node[S, T] | None = match.node if match else None
        self._cache = cache

    def insert(self, segment: S, tail: T | None) -> bool:
        """Keeps `segment`, made for the tokens from `num_tokens` on, and the tail of the whole; see the cache's own."""
        try:
            return self._cache.insert(self.token_ids, self.num_tokens, segment, tail, self.salt)
        finally:
            self._cache.end_computing(self)

    def close(self) -> None:
        self._cache.release(self)

    def __enter__(self) -> Lease[S, T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class PrefixCache(Generic[S, T]):
    """Thread-safe. `num_bytes` never exceeds `capacity_bytes`; tensors that a lease still holds may outlive that.

    `max_entries` bounds the number of whole prefixes, `max_age_seconds` the time from keeping a prefix, or one that
    goes on from it, to its last use; neither is bounded by default. `clock` gives seconds.
    """

    def __init__(
        self,
        capacity_bytes: int = CAPACITY_BYTES,
        min_tokens: int = MIN_TOKENS,
        *,
        max_entries: int | None = None,
        max_age_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; it must be 0 or more")
        if min_tokens < 1:
            raise ValueError(f"min_tokens is {min_tokens}; it must be 1 or more")
        if max_entries is not None and max_entries < 1:
            raise ValueError(f"max_entries is {max_entries}; it must be 1 or more")
        if max_age_seconds is not None and max_age_seconds <= 0:
            raise ValueError(f"max_age_seconds is {max_age_seconds}; it must be more than 0")
        self.capacity_bytes = capacity_bytes
        self.min_tokens = min_tokens
        self.max_entries = max_entries
        self.max_age_seconds = max_age_seconds
        self._now_s = clock
        self.num_bytes = 0
        self._roots: dict[str, Root[S, T]] = {}
        self._computing: list[Lease[S, T]] = []
        self._changed = threading.Condition()
        self._clock = itertools.count(1)
        self._leaves: list[tuple[int, int, Node[S, T]]] = []  # a heap by last use; stale entries stay until popped
        self._most_entries = 64
        self._hits = self._misses = self._evictions = self._expirations = self._tokens_saved = self._waits = 0

    # -- for requests ----------------------------------------------------------------------------------------------

    def acquire(self, token_ids: Sequence[int], salt: str = "") -> Lease[S, T]:
        """What is known of the beginning of these tokens, pinned.

        While another request computes a beginning of at least `min_tokens` more than what is known, this one waits for
        it, so that it is computed once. A caller must not hold an unfinished lease of its own meanwhile.
        """
        tokens = tuple(token_ids)
        with self._changed:
            self._drop_expired(tokens, salt)
            if self._is_being_computed(tokens, salt):
                self._waits += 1
                self._changed.wait_for(lambda: not self._is_being_computed(tokens, salt))
            match = self._match(tokens, salt)
            is_hit = match.num_tokens >= self.min_tokens
            lease = Lease(self, tokens, salt, match if is_hit else None)
            if is_hit:
                self._hits += 1
                self._tokens_saved += match.num_tokens
                self._touch(match.node)
                for node in match.node.path():
                    node.num_pins += 1
            else:
                self._misses += 1
            self._computing.append(lease)
            return lease

    def insert(self, token_ids: Sequence[int], start: int, segment: S, tail: T | None, salt: str = "") -> bool:
        """Keeps copies of `segment`, made for the tokens from `start` on, and of the tail of the whole.

        False when it isn't kept: no room, too short, or what stands before `start` is gone by now.
        """
        tokens = tuple(token_ids)
        assert len(segment) == len(tokens) - start, f"{len(segment)} tokens' payload for {len(tokens) - start} tokens"
        with self._changed:
            return len(tokens) >= self.min_tokens and self._insert(tokens, start, segment, tail, salt)

    def end_computing(self, lease: Lease[S, T]) -> None:
        """Requests that waited for it go on."""
        with self._changed:
            if lease in self._computing:
                self._computing.remove(lease)
                self._changed.notify_all()

    def release(self, lease: Lease[S, T]) -> None:
        with self._changed:
            self.end_computing(lease)
            if lease.pinned is not None:
                for node in lease.pinned.path():
                    node.num_pins -= 1
                lease.pinned = None
            lease.segments = []
            lease.tail = None

    def get(self, token_ids: Sequence[int], salt: str = "") -> PrefixEntry[S, T] | None:
        """The longest known beginning of these tokens, if it has `min_tokens`. For looking: it pins and counts nothing.

        What the entry holds stays valid after an eviction.
        """
        with self._changed:
            self._drop_expired(tuple(token_ids), salt)
            match = self._match(tuple(token_ids), salt)
            if match.num_tokens < self.min_tokens:
                return None
            return PrefixEntry(match.num_tokens, tuple(match.segments()), match.tail)

    # -- for operators ---------------------------------------------------------------------------------------------

    def clear(self) -> PrefixCacheStats:
        """Forgets everything but the counts, and returns what there was. Running requests keep the tensors they hold,
        and what they insert later is dropped.
        """
        with self._changed:
            dropped = self.stats()
            self._roots.clear()
            self._leaves.clear()
            self.num_bytes = 0
            return dropped

    def stats(self) -> PrefixCacheStats:
        with self._changed:
            nodes, total_requests = self._nodes(), self._hits + self._misses
            return PrefixCacheStats(
                cache_size=sum(node.tail is not None for node in nodes),
                num_nodes=len(nodes),
                num_bytes=self.num_bytes,
                capacity_bytes=self.capacity_bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                expirations=self._expirations,
                tokens_saved=self._tokens_saved,
                waits=self._waits,
                total_requests=total_requests,
                hit_rate=self._hits / total_requests if total_requests else 0.0,
            )

    def get_stats(self) -> dict[str, float]:
        """The counts under the names that the original demonstration's cache gives them."""
        stats = self.stats()
        return {
            "size": stats.cache_size,
            "hits": stats.hits,
            "misses": stats.misses,
            "hit_rate": stats.hit_rate,
            "total_requests": stats.total_requests,
            "evictions_lru": stats.evictions,
            "evictions_ttl": stats.expirations,
            "cached_tokens_reused": stats.tokens_saved,
        }

    def check_integrity(self) -> None:
        """Compare every derived figure with the tree itself. Raises `AssertionError`."""
        with self._changed:
            nodes = self._nodes()
            assert self.num_bytes == sum(node.num_bytes for node in nodes) <= self.capacity_bytes
            in_heap = {(used, id(node)) for used, _, node in self._leaves}
            for node in nodes:
                assert node.tokens
                assert node.parent is not None
                assert node.segment is not None
                assert len(node.segment) == len(node.tokens)
                assert node.parent.children[node.tokens[0]] is node
                assert node.num_pins >= sum(child.num_pins for child in node.children.values())
                assert all(child.last_used <= node.last_used for child in node.children.values())
                assert all(child.kept_s <= node.kept_s for child in node.children.values())
                assert node.children or (node.last_used, id(node)) in in_heap, "a leaf that could never be evicted"
            assert all(root.children for root in self._roots.values()), "an empty tree"
            assert len(self._leaves) <= self._most_entries
            assert self.max_entries is None or sum(node.tail is not None for node in nodes) <= self.max_entries

    # -- under the lock --------------------------------------------------------------------------------------------

    def _nodes(self) -> list[Node[S, T]]:
        return [node for root in self._roots.values() for node in root.below()]

    def _match(self, tokens: TokenIds, salt: str) -> Match[S, T]:
        """What a request can take over. Without its tail a whole prompt's last token has to be run once more."""
        root = self._roots.get(salt)
        if root is None:
            return Match(Node(), 0, 0)
        match = find_longest(root, tokens)
        is_whole = match.num_tokens == len(tokens)
        return self._young(find_longest(root, tokens[:-1]) if is_whole and match.tail is None else match)

    def _young(self, match: Match[S, T]) -> Match[S, T]:
        """Without the part that is too old; such a part is still in the tree if a request stands on it."""
        old = self._old_on(match.node)
        if not old:
            return match
        parent = old[-1].parent
        assert parent is not None
        num_tokens = sum(len(node.tokens) for node in parent.path())
        return Match(parent, len(parent.tokens), num_tokens)

    def _old_on(self, node: Node[S, T]) -> list[Node[S, T]]:
        """What is too old on the way to a node, the node itself first: what is above was kept no earlier."""
        if self.max_age_seconds is None:
            return []
        oldest_s = self._now_s() - self.max_age_seconds
        return [one for one in node.path() if one.kept_s < oldest_s]

    def _drop_expired(self, tokens: TokenIds, salt: str) -> None:
        """What is too old on the way of these tokens, with all that goes on from it, as far as no request uses it."""
        root = self._roots.get(salt)
        if self.max_age_seconds is None or root is None:
            return
        old = self._old_on(find_longest(root, tokens).node)
        if not old:
            return
        for node in reversed([old[-1], *old[-1].below()]):  # those below come after those above them
            if not node.num_pins and not node.children:
                self._expirations += node.tail is not None
                self._remove(node)

    def _is_being_computed(self, tokens: TokenIds, salt: str) -> bool:
        num_worth_waiting = self._match(tokens, salt).num_tokens + self.min_tokens
        return any(
            other.salt == salt and common_length(other.token_ids, tokens) >= num_worth_waiting
            for other in self._computing
        )

    def _insert(self, tokens: TokenIds, start: int, segment: S, tail: T | None, salt: str) -> bool:
        root = self._roots.setdefault(salt, Root(salt=salt))
        match = find_longest(root, tokens)
        node = match.node
        try:
            if match.num_tokens < start:
                return False
            if not match.is_whole_node:
                node = split(node, match.num_in_node)
            rest = segment.slice(match.num_tokens - start, len(segment))
            new_tail = tail if match.num_tokens < len(tokens) or node.tail is None else None
            num_new_bytes = rest.num_bytes + (new_tail.num_bytes if new_tail is not None else 0)
            if not self._make_room(num_new_bytes, keep=node):
                return False
            self._roots[salt] = root  # making room may have emptied it
            if match.num_tokens < len(tokens):
                rest_tokens = tokens[match.num_tokens :]
                assert len(rest) == len(rest_tokens), f"{len(rest)} tokens' payload for {len(rest_tokens)} tokens"
                assert rest_tokens[0] not in node.children
                child = Node(rest_tokens, rest.copy(), parent=node)
                node.children[rest_tokens[0]] = child
                node = child
            if new_tail is not None:
                node.tail = new_tail.copy()
            self.num_bytes += num_new_bytes
            if start < len(tokens):  # else it was all taken over, and is as old as it was
                for kept in node.path():
                    kept.kept_s = self._now_s()
            return True
        finally:
            self._touch(node)
            self._bound_entries(keep=node)
            self._drop_if_empty(root)

    def _touch(self, node: Node[S, T]) -> None:
        now = next(self._clock)
        for used in node.path():
            used.last_used = now
        self._remember_leaf(node)

    def _remember_leaf(self, node: Node[S, T]) -> None:
        if node.parent is None or node.children:
            return
        heapq.heappush(self._leaves, (node.last_used, next(self._clock), node))
        if len(self._leaves) > self._most_entries:
            leaves = [node for node in self._nodes() if not node.children]
            self._leaves = [(leaf.last_used, next(self._clock), leaf) for leaf in leaves]
            heapq.heapify(self._leaves)
            self._most_entries = 64 + 2 * len(leaves)

    def _make_room(self, num_new_bytes: int, keep: Node[S, T]) -> bool:
        if num_new_bytes > self.capacity_bytes:
            return False
        keep.num_pins += 1  # it may be a leaf, and its pins alone keep it; those above it aren't leaves
        try:
            while self.num_bytes + num_new_bytes > self.capacity_bytes:
                if not self._evict_one():
                    return False
            return True
        finally:
            keep.num_pins -= 1

    def _evict_one(self) -> bool:
        pinned = []
        try:
            while self._leaves:
                entry = heapq.heappop(self._leaves)
                used, _, node = entry
                if node.parent is None or node.children or used != node.last_used:
                    continue  # gone, no leaf any more, or used since
                if node.num_pins:
                    pinned.append(entry)
                    continue
                self._remove(node)
                self._evictions += 1
                return True
            return False
        finally:
            for entry in pinned:
                heapq.heappush(self._leaves, entry)

    def _bound_entries(self, keep: Node[S, T]) -> None:
        """Drops whole prefixes, least recently used first, until there are as many as may be. What others go on from
        loses its tail alone.
        """
        if self.max_entries is None:
            return
        entries = sorted((n for n in self._nodes() if n.tail is not None), key=lambda n: n.last_used)
        num_too_many = len(entries) - self.max_entries
        for node in [node for node in entries if node is not keep][: max(0, num_too_many)]:
            assert node.tail is not None
            self.num_bytes -= node.tail.num_bytes
            node.tail = None
            self._evictions += 1
            left: Node[S, T] | None = node
            while left is not None and left.parent and not (left.children or left.num_pins or left.tail):
                above = left.parent
                self._remove(left)
                left = above

    def _remove(self, node: Node[S, T]) -> None:
        parent, node.parent = node.parent, None
        assert parent is not None
        assert not node.children, "only a leaf can be taken out"
        del parent.children[node.tokens[0]]
        self.num_bytes -= node.num_bytes
        self._remember_leaf(parent)
        if isinstance(parent, Root):
            self._drop_if_empty(parent)

    def _drop_if_empty(self, root: Root[S, T]) -> None:
        if not root.children and self._roots.get(root.salt) is root:
            del self._roots[root.salt]
