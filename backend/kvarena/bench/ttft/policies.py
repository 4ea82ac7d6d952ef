"""What a blend recomputes, as it is typed: `POLICY[:RATIO][@LAYER][,OPTION=VALUE ...]`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvarena.bench.quality.setups import OPTIONS, Setup
from kvarena.reuse.params import BlendParams

DEFAULT_POLICIES = ("kv_deviation:0.15", "chunk_head:0.05", "query_attention:0.05", "none")
SYNTAX = re.compile(r"(?P<policy>[a-z_]+)(:(?P<ratio>[^@,]+))?(@(?P<check_layer>\d+))?(?P<options>(,[a-z_]+=\w+)*)")


def read_policy(text: str, contender: str) -> Setup:
    """`kv_deviation:0.15@2,num_filters=2` is 15 % at check layer 2 with gradual filtering.

    What isn't given is the server's own. Raises `ValueError` naming what can't be chosen, and the choices.
    """
    match = SYNTAX.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"policy is {text!r}; write it as kv_deviation, kv_deviation:0.15 or kv_deviation:0.15@2")
    given = dict(option.split("=") for option in match["options"].split(",")[1:])
    if unknown := sorted(given.keys() - set(OPTIONS)):
        raise ValueError(f"policy {text!r} has no option {unknown[0]!r}; there are {', '.join(OPTIONS)}")
    try:
        setup = Setup(
            contender,
            match["policy"],
            float(match["ratio"]) if match["ratio"] else None,
            int(match["check_layer"]) if match["check_layer"] else None,
            given.get("deviation"),
            *(int(given[name]) if name in given else None for name in ("num_filters", "head_tokens")),
        )
        BlendParams(**setup.choices)
    except ValueError as error:
        raise ValueError(f"policy {text!r}: {error}") from error
    return setup


def read_policies(texts: Sequence[str], contender: str) -> list[Setup]:
    return list(dict.fromkeys(read_policy(text, contender) for text in texts))
