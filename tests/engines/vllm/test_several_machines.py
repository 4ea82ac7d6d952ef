"""Two vLLMs, two LMCache servers and one Redis, as on two machines: chunks of one are chunks of the other."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

from kvarena.engines.vllm.config import BlendConfig
from kvarena.stack.lmcache_l2 import l2_adapter
from support.lmcache_server import LMCacheServer
from support.redis_server import RedisServer, running_redis
from support.tiny_models import random_text, save_tiny_model
from support.vllm_engine import Step, plain_tokens, run_in_engine, run_steps

pytestmark = pytest.mark.slow
SEPARATOR = " # # "
NUM_CHUNKS = 4


class Machine:
    """Its own folder, with its own copy of the model (files keep their times) and its own list of known chunks."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = str(shutil.copytree(model, folder / model.name))

    def config(self, server: LMCacheServer) -> BlendConfig:
        return BlendConfig(
            lmcache_url=server.url,
            lmcache_http_url=server.http_url,
            lmcache_timeout_s=5.0,
            index_path=str(self.folder / "known.sqlite"),
        )


def wait_for_keys(redis: RedisServer, least: int) -> None:
    deadline = time.monotonic() + 60
    while redis.num_keys() < least:
        assert time.monotonic() < deadline, redis.num_keys()
        time.sleep(0.2)


def test_a_chunk_computed_by_one_is_reused_by_the_other(tmp_path: Path) -> None:
    rng = random.Random(21)
    chunks = [random_text(rng, 60) for _ in range(NUM_CHUNKS)]
    prompts = [
        SEPARATOR.join(["tea", *ordered, "bread"]) for ordered in (chunks, chunks[::-1], chunks[1:] + chunks[:1])
    ]
    unknown = SEPARATOR.join(["tea", random_text(rng, 70), "bread"])
    model = save_tiny_model(tmp_path / "model")
    one, other = (Machine(tmp_path / name, model) for name in ("one", "other"))
    expected = run_in_engine(plain_tokens, one.model, [*prompts, unknown], 16)

    with running_redis(tmp_path) as redis:
        l2 = l2_adapter(redis.url, 0.0, tmp_path)
        with LMCacheServer(one.folder, l2) as first, LMCacheServer(other.folder, l2) as second:
            cold = run_in_engine(run_steps, one.model, one.config(first), [Step(prompts[:1], 16, {"ratio": 1})], {})
            assert cold[0].reports[0]["store_misses"] == NUM_CHUNKS
            wait_for_keys(redis, NUM_CHUNKS)

            steps = [Step([prompt], 16, {"ratio": 1}) for prompt in [*prompts[1:], unknown]]
            steps[-1] = Step([unknown], 16, {"ratio": 1}, kill_pid=redis.process.pid)
            warm = run_in_engine(run_steps, other.model, other.config(second), steps, {})
    assert [outcome.tokens[0] for outcome in [*cold, *warm]] == expected
    reports = [outcome.reports[0] for outcome in warm]
    assert [report["store_hits"] for report in reports] == [NUM_CHUNKS, NUM_CHUNKS, 0]
    assert [report["store_misses"] for report in reports] == [0, 0, 1]
