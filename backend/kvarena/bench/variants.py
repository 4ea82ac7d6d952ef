"""What is compared: a contender with one choice of policy, ratio and check layer, and how such a choice is typed.

`kvarena bench ttft` takes `POLICY[:RATIO or :MSms][@LAYER][,OPTION=VALUE ...]`, `kvarena eval` a list of
policies, ratios and check layers. Nothing here asks a contender.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvarena.client import ServerInfo
from kvarena.contenders.spec import contender_specs
from kvarena.panels.panel import variant_label
from kvarena.policies.params import OPTIONS, PARAMETERS, POLICIES, BlendParams, check_max_ttft_ms, make_policy
from kvarena.policies.registry import NAME, Value

_IN_SYNTAX = ("ratio", "check_layer")
"""Parameters that have a sign of their own; the others are written as options."""


@dataclass(frozen=True)
class Variant:
    """What isn't chosen is None: contenders that don't blend have nothing to choose, `none` and `all` no ratio.

    `options` are a policy's own beside these, such as `(("deviation", "values"),)`. `max_ttft_ms` is a time to first
    token by which the server chooses the ratio. `sink_tokens`: what chunks are computed after, which no request can
    choose; None is whatever the contender was started with.
    """

    contender: str
    policy: str | None = None
    ratio: float | None = None
    check_layer: int | None = None
    options: tuple[tuple[str, Value], ...] = ()
    max_ttft_ms: float | None = None
    sink_tokens: int | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Variant:
        """The one that a result's row is about."""
        options = tuple((row.get("options") or {}).items())
        layer, max_ttft_ms, sink_tokens = (row.get(key) for key in ("check_layer", "max_ttft_ms", "sink_tokens"))
        return cls(row["contender"], row["policy"], row["ratio"], layer, options, max_ttft_ms, sink_tokens)

    @property
    def label(self) -> str:
        """Such as `blend kv_deviation 15 % @2` or `blend kv_deviation 300 ms @2`, where 2 is the check layer."""
        return variant_label(self.to_json())

    @property
    def choices(self) -> dict[str, Any]:
        """The chosen values, by their names in `kv_transfer_params.kvarena`."""
        return self._params | ({} if self.max_ttft_ms is None else {"max_ttft_ms": self.max_ttft_ms})

    @property
    def profile(self) -> dict[str, Any]:
        """The same as settings that a server starts with, by their names in `kvarena.json`; with the sink."""
        return self.choices | ({} if self.sink_tokens is None else {"sink_tokens": self.sink_tokens})

    @property
    def _params(self) -> dict[str, Any]:
        chosen = {"policy": self.policy, "ratio": self.ratio, "check_layer": self.check_layer, **dict(self.options)}
        return {name: value for name, value in chosen.items() if value is not None}

    def check(self) -> None:
        """Raises `ValueError` naming a value that can't be chosen, and the choices."""
        params = BlendParams(**self._params)
        if self.max_ttft_ms is not None:
            check_max_ttft_ms(self.max_ttft_ms, params)

    @property
    def recomputes_all(self) -> bool:
        return self.max_ttft_ms is None and self.policy is not None and BlendParams(**self._params).recomputes_all

    @property
    def work(self) -> Variant:
        """What is really done: with nothing or all to recompute, policies and check layers don't differ, and with all
        sinks don't.
        """
        if self.policy is None or self.max_ttft_ms is not None:
            return self
        params = BlendParams(**self._params)
        if params.recomputes_all:
            return Variant(self.contender, "all")
        return Variant(self.contender, "none", sink_tokens=self.sink_tokens) if params.recomputes_none else self

    def to_json(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("contender", "policy", "ratio", "check_layer")}
        rare = {name: value for name in ("max_ttft_ms", "sink_tokens") if (value := getattr(self, name)) is not None}
        return {**named, **rare, "options": dict(self.options)}


def blend_variants(
    contender: str, policies: Sequence[str], ratios: Sequence[float], check_layers: Sequence[int]
) -> list[Variant]:
    """Every policy at every ratio, and the check layers for those that have one; no layers: the server's own.

    A policy may bring options: `kv_deviation,deviation=values,num_filters=2`.
    Raises `ValueError` naming a value that can't be chosen, and the choices.
    """
    variants = []
    for policy, options in map(read_policy_options, policies):
        has_layers = check_layers and "check_layer" in OPTIONS.get(policy, ())
        own: dict[str, Any] = dict(options)
        layers: Sequence[int | None] = check_layers if has_layers else [None]
        for ratio in ratios if BlendParams(policy, **own).goes_by_ratio else [None]:
            variants += [Variant(contender, policy, ratio, layer, options) for layer in layers]
    for variant in variants:
        variant.check()
    return list(dict.fromkeys(variants))


def is_blend(server: ServerInfo) -> bool:
    """Whether a policy can be chosen: a server names its contender, and those that keep chunks blend them."""
    spec = contender_specs().get(server.contender)
    return spec is not None and spec.has_chunk_cache


def reads_scores(policy: str | None) -> bool:
    """Whether it chooses by scores that are stored with chunks."""
    return policy is not None and make_policy(BlendParams(policy)).reads_scores


def read_policy_options(given: str) -> tuple[str, tuple[tuple[str, Value], ...]]:
    """A policy and its options, such as `chunk_head,head_tokens=12`. Raises `ValueError` for one it hasn't."""
    policy, *parts = (part.strip() for part in given.split(","))
    if policy not in POLICIES:
        hint = "; ratios are --ratio, check layers --check-layer" if re.search("[:@]", policy) else ""
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}{hint}")
    options = dict(part.partition("=")[::2] for part in parts)
    known = [name for name in OPTIONS.get(policy, ()) if name not in _IN_SYNTAX]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{policy} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return policy, tuple((name, PARAMETERS[name].read(value)) for name, value in options.items())


def find_reference(variants: Sequence[Variant]) -> Variant | None:
    """The one that stands for full prefill: a contender that doesn't approximate, or else a blend of all tokens."""
    exact = [variant for variant in variants if variant.policy is None]
    return next(iter([*exact, *(variant for variant in variants if variant.recomputes_all)]), None)


DEFAULT_POLICIES = ("kv_deviation:0.15", "chunk_head:0.05", "query_attention:0.05", "none")
"""What `kvarena bench ttft` measures unless it is told others: few, for each is asked at every length."""
SYNTAX = re.compile(rf"(?P<policy>{NAME})(:((?P<ms>[\d.]+)ms|(?P<ratio>[^@]+)))?(@(?P<check_layer>\d+))?")


def read_policy(text: str, contender: str) -> Variant:
    """`kv_deviation:0.15@2,num_filters=2` is 15 % at check layer 2 with gradual filtering, `kv_deviation:300ms` what
    fits into 300 ms to the first token.

    What isn't given is the server's own. Raises `ValueError` naming what can't be chosen, and the choices.
    """
    before_options, comma, options = text.strip().partition(",")
    match = SYNTAX.fullmatch(before_options)
    if match is None:
        raise ValueError(
            f"policy is {text!r}; write it as chunk_head, chunk_head:0.05, kv_deviation:300ms or kv_deviation:0.15@2"
        )
    try:
        variant = Variant(
            contender,
            match["policy"],
            float(match["ratio"]) if match["ratio"] else None,
            int(match["check_layer"]) if match["check_layer"] else None,
            read_policy_options(match["policy"] + comma + options)[1],
            float(match["ms"]) if match["ms"] else None,
        )
        if match["check_layer"] and "check_layer" not in OPTIONS[variant.policy or ""]:
            raise ValueError(f"{variant.policy} has no check layer")
        variant.check()
    except ValueError as error:
        raise ValueError(f"policy {text!r}: {error}") from error
    return variant


def read_policies(texts: Sequence[str], contender: str) -> list[Variant]:
    return list(dict.fromkeys(read_policy(text, contender) for text in texts))
