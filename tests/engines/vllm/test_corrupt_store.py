"""A store whose every entry is damaged, in memory or in its second tier, on real vLLM and a real LMCache server: the
answers are plain vLLM's.
"""

from __future__ import annotations

import random
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from kvarena.engines.vllm.config import BlendConfig
from kvarena.stack.lmcache_l2 import l2_adapter
from support.lmcache_server import LMCacheServer, flip_bits, flip_files
from support.tiny_models import random_text, save_tiny_model
from support.vllm_engine import Step, plain_tokens, run_in_engine, run_steps

pytestmark = pytest.mark.slow
SETTINGS: list[dict[str, Any]] = [
    {"policy": "none"},
    {"ratio": 0.15},
    {"policy": "chunk_head", "head_tokens": 4},
    {"policy": "query_attention", "ratio": 0.5},
    {"ratio": 1},
]


def test_damaged_chunks_leave_plain_answers(tmp_path: Path) -> None:
    """Each setting has a salt of its own in each tier: it meets damaged chunks, and none that were stored anew."""
    rng = random.Random(5)
    chunks = [random_text(rng, 60) for _ in range(4)]
    orders = (chunks, chunks[1:] + chunks[:1], chunks[::-1])
    *known, asked = (" # # ".join(["tea", *ordered, "bread"]) for ordered in orders)
    model = str(save_tiny_model(tmp_path / "model"))
    (expected,) = run_in_engine(plain_tokens, model, [asked], 24)

    salts = {tier: [f"{tier} {settings}" for settings in SETTINGS] for tier in ("memory", "files")}
    warm = [Step([prompt], 1, {"ratio": 1}, salt=salt) for salt in chain(*salts.values()) for prompt in known]
    with LMCacheServer(tmp_path, l2_adapter("kept", 1.0, tmp_path), l1_gb=0.125) as server:
        config = BlendConfig(lmcache_url=server.url, lmcache_http_url=server.http_url, lmcache_timeout_s=5.0)
        damages = {
            "memory": partial(flip_bits, server.memory_path),
            "files": partial(flip_files, tmp_path / "kept", server.http_url, 2 * len(chunks) * len(SETTINGS)),
        }
        steps = [
            Step([asked], 24, settings, salt=salt, damage=damages[tier] if salt == salts[tier][0] else None)
            for tier in salts
            for settings, salt in zip(SETTINGS, salts[tier], strict=True)
        ]
        outcomes = run_in_engine(run_steps, model, config, [*warm, *steps], {})
    reports = [outcome.reports[0] for outcome in outcomes]
    assert [report["store_hits"] for report in reports[: len(warm)]] == [0, len(chunks)] * (2 * len(SETTINGS))
    for outcome in outcomes[len(warm) :]:
        assert outcome.tokens == [expected]
        report = outcome.reports[0]
        assert (report["store_hits"], report["store_misses"]) == (0, len(chunks))
        assert report["store_errors"] == len(chunks)
        assert report["num_computed_tokens"] == report["num_prompt_tokens"]
