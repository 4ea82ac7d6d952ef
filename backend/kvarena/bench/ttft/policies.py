"""What a blend recomputes, as it is typed: `POLICY[:RATIO or :MSms][@LAYER][,OPTION=VALUE ...]`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvarena.bench.quality.setups import Setup, read_policy_options

DEFAULT_POLICIES = ("kv_deviation:0.15", "chunk_head:0.05", "query_attention:0.05", "none")
SYNTAX = re.compile(r"(?P<policy>[a-z_]+)(:((?P<ms>[\d.]+)ms|(?P<ratio>[^@]+)))?(@(?P<check_layer>\d+))?")


def read_policy(text: str, contender: str) -> Setup:
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
        setup = Setup(
            contender,
            match["policy"],
            float(match["ratio"]) if match["ratio"] else None,
            int(match["check_layer"]) if match["check_layer"] else None,
            read_policy_options(match["policy"] + comma + options)[1],
            float(match["ms"]) if match["ms"] else None,
        )
        setup.check()
    except ValueError as error:
        raise ValueError(f"policy {text!r}: {error}") from error
    return setup


def read_policies(texts: Sequence[str], contender: str) -> list[Setup]:
    return list(dict.fromkeys(read_policy(text, contender) for text in texts))
