"""Hooks on attention layers during our own forwards: reading queries, keys and values as they pass.

They are on the model only while such a forward runs; stock traffic is never hooked. A hook may end the
forward that it was put there for, by `EndForward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

KVHook = Callable[[int, torch.Tensor, torch.Tensor], None]
QueriesHook = Callable[[torch.Tensor], None]
LayerHook = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
Hook = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@contextmanager
def reading_kv(
    attentions: Sequence[torch.nn.Module], layers: Sequence[int], on_kv: KVHook, *, before_others: bool = False
) -> Iterator[None]:
    """Call `on_kv(layer, keys, values)` (each `(T, H_kv * D)`, valid only during the call) before these attend."""

    def hook_of(layer: int) -> Hook:
        def hook(_query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
            on_kv(layer, key.flatten(1), value.flatten(1))

        return hook

    with _hooked([(attentions[layer], hook_of(layer)) for layer in layers], first=before_others):
        yield


@contextmanager
def reading_layers(attentions: Sequence[torch.nn.Module], on_layer: LayerHook) -> Iterator[None]:
    """Call `on_layer(layer, queries, keys, values)` (`(T, heads * D)`, valid only during the call) in each layer."""

    def hook_of(layer: int) -> Hook:
        def hook(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
            on_layer(layer, query.flatten(1), key.flatten(1), value.flatten(1))

        return hook

    with _hooked([(attention, hook_of(layer)) for layer, attention in enumerate(attentions)]):
        yield


@contextmanager
def reading_queries(attention: torch.nn.Module, on_queries: QueriesHook) -> Iterator[None]:
    """Call `on_queries(queries)` (`(T, H * D)`, rotated, valid only during the call) before this layer attends."""

    def hook(query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor) -> None:
        on_queries(query.flatten(1))

    with _hooked([(attention, hook)]):
        yield


@contextmanager
def _hooked(hooks: Sequence[tuple[torch.nn.Module, Hook]], *, first: bool = False) -> Iterator[None]:
    for attention, hook in hooks:
        own = _hooked_forward(attention).hooks
        own.insert(0 if first else len(own), hook)
    try:
        yield
    finally:
        for attention, hook in hooks:
            _hooked_forward(attention).hooks.remove(hook)
            if not _hooked_forward(attention).hooks:
                del attention.forward


@dataclass
class _HookedForward:
    """An attention layer's `forward` with hooks on what it is given. In its place, and not one of torch's own hooks:
    vLLM calls the layers of models that come from Transformers past those.
    """

    original: Callable[..., torch.Tensor]
    hooks: list[Hook] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        for hook in self.hooks:
            hook(*[*args, *kwargs.values()][:3])
        return self.original(*args, **kwargs)


def _hooked_forward(attention: torch.nn.Module) -> _HookedForward:
    if not isinstance(attention.forward, _HookedForward):
        attention.forward = _HookedForward(attention.forward)
    return attention.forward
