"""Policies as they are typed."""

from __future__ import annotations

import pytest

from kvarena.bench.variants import DEFAULT_POLICIES, Variant, blend_variants, is_blend, read_policies, read_policy
from kvarena.client import ServerInfo


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("none", Variant("blend", "none")),
        ("chunk_head:0.05", Variant("blend", "chunk_head", 0.05)),
        ("kv_deviation:0.15@2", Variant("blend", "kv_deviation", 0.15, 2)),
        ("query_attention@3", Variant("blend", "query_attention", None, 3)),
        (
            "kv_deviation:0.1@1,num_filters=2,deviation=values",
            Variant("blend", "kv_deviation", 0.1, 1, (("num_filters", 2), ("deviation", "values"))),
        ),
        ("kv_deviation:300ms@2", Variant("blend", "kv_deviation", None, 2, max_ttft_ms=300.0)),
        ("chunk_head,head_tokens=12", Variant("blend", "chunk_head", options=(("head_tokens", 12),))),
    ],
)
def test_policies_read(text: str, variant: Variant) -> None:
    assert read_policy(text, "blend") == variant


def test_a_policy_typed_twice_is_measured_once() -> None:
    assert len(read_policies([*DEFAULT_POLICIES, "none"], "blend")) == len(DEFAULT_POLICIES)


def test_options_are_sent_named_and_written_down() -> None:
    variant = read_policy("chunk_head,head_tokens=12", "blend")
    assert variant.choices == {"policy": "chunk_head", "head_tokens": 12}
    assert variant.label == "blend chunk_head (head_tokens 12)"
    assert variant.to_json()["options"] == {"head_tokens": 12}


def test_a_time_is_sent_named_and_written_down() -> None:
    variant = read_policy("query_attention:250.5ms", "blend")
    assert variant.choices == {"policy": "query_attention", "max_ttft_ms": 250.5}
    assert variant.label == "blend query_attention 250.5 ms"
    assert Variant.of_row(variant.to_json()) == variant.work == variant
    assert "max_ttft_ms" not in read_policy("query_attention:0.25", "blend").to_json()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("none:300ms", "which none doesn't go by"),
        ("chunk_head:300ms,head_tokens=3", "which chunk_head doesn't go by"),
        ("kv_deviation:0ms", "max_ttft_ms must be a number above 0 and at most 86400000, not 0.0"),
        ("kv_deviation:1.2.3ms", "could not convert"),
        ("best:0.1", "policy must be one of kv_deviation"),
        ("chunk_head:0.1@1", "chunk_head has no check layer"),
        ("kv_deviation:2", "ratio must be a number from 0 to 1, not 2.0"),
        ("kv_deviation:much", "could not convert"),
        ("chunk_head,heads=3", "no option 'heads'; it has head_tokens"),
        ("chunk_head,head_tokens=x", "'x'"),
        ("kv_deviation@@1", "write it as"),
        ("", "write it as"),
    ],
)
def test_bad_policies(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_policy(text, "blend")


def test_a_ratio_has_an_option_of_its_own_where_policies_are_listed() -> None:
    with pytest.raises(ValueError, match=r"not 'chunk_head:0\.1'; ratios are --ratio, check layers --check-layer"):
        blend_variants("blend", ["chunk_head:0.1,head_tokens=2"], [0.1], [])


@pytest.mark.parametrize(
    ("offer", "blends"),
    [
        ({"contender": "blend"}, True),
        ({"contender": "simllm", "policies": ["kv_deviation"]}, False),
        ({"contender": "nobody's"}, False),
        (None, False),
    ],
)
def test_a_server_that_keeps_chunks_takes_a_policy(offer: dict[str, object] | None, blends: bool) -> None:
    assert is_blend(ServerInfo("town", offer=offer)) == blends
