"""A radix tree over token ids whose edges carry a payload: what is kept for the tokens of that edge.

Pure structure: no locks, no budget, no eviction. `PrefixCache` adds those. Payloads are generic, so that the tree can
be tested without tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

TokenIds = tuple[int, ...]


class Segment(Protocol):
    """What is kept for a run of tokens, such as their KV. Never changed once it is in a tree."""

    @property
    def num_bytes(self) -> int: ...

    def __len__(self) -> int:
        """How many tokens."""
        ...

    def slice(self, start: int, end: int) -> Self:
        """The part `[start, end)`, as a view: it lives no longer than the whole is wanted."""
        ...

    def copy(self) -> Self:
        """The same in memory of its own, where the tree keeps its payloads."""
        ...


class Tail(Protocol):
    """What is kept for the place behind a run of tokens, such as the logits there."""

    @property
    def num_bytes(self) -> int: ...

    def copy(self) -> Self: ...


S = TypeVar("S", bound=Segment)
T = TypeVar("T", bound=Tail)


@dataclass(eq=False)
class Node(Generic[S, T]):
    """The tokens of the edge from its parent, what is kept for them, and for the place behind them.

    `num_pins` counts the leases on this node or on one below it; only a node without any may be evicted.
    """

    tokens: TokenIds = ()
    segment: S | None = None
    tail: T | None = None
    parent: Node[S, T] | None = None
    children: dict[int, Node[S, T]] = field(default_factory=dict)
    num_pins: int = 0
    last_used: int = 0

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
    )
    node.parent.children[node.tokens[0]] = upper
    node.segment = node.segment.slice(at, len(node.tokens)).copy()
    node.tokens = node.tokens[at:]
    node.parent = upper
    return upper


def add_child(parent: Node[S, T], tokens: TokenIds, segment: S) -> Node[S, T]:
    assert len(segment) == len(tokens) > 0, f"{len(segment)} tokens' payload for {len(tokens)} tokens"
    assert tokens[0] not in parent.children
    child = Node(tokens=tokens, segment=segment, parent=parent)
    parent.children[tokens[0]] = child
    return child


def remove_leaf(node: Node[S, T]) -> None:
    assert not node.children, "only a leaf can be taken out"
    assert node.parent is not None
    del node.parent.children[node.tokens[0]]
    node.parent = None
