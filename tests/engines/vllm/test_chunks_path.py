"""`POST /kvarena/chunks` looks into the store, past vLLM's prefix cache; and a warm-up ends with every chunk there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvarena.client import ChunkOutcome, Client
from kvarena.documents import TextChunk
from kvarena.engines.vllm.config import BlendConfig
from kvarena.stack.chunk_cache import warm
from support.lmcache_server import LMCacheServer
from support.tiny_models import random_text, save_tiny_model
from support.vllm_server import api_server

pytestmark = pytest.mark.slow
SEPARATOR = " # # "


def look_up(client: httpx.Client, prompt: object, **more: object) -> list[dict[str, Any]]:
    answer = client.post("/kvarena/chunks", json={"prompt": prompt, **more}).raise_for_status().json()
    chunks: list[dict[str, Any]] = answer["chunks"]
    return chunks


def ask(client: httpx.Client, texts: list[str], **more: Any) -> dict[str, Any]:
    prompt = SEPARATOR.join(["tea", *texts, "old cat"])
    request = {"model": "tiny", "prompt": prompt, "max_tokens": 2, **more}
    answer: dict[str, Any] = client.post("/v1/completions", json=request).raise_for_status().json()
    return answer


def test_a_warm_up_ends_with_every_chunk_in_the_store(tmp_path: Path) -> None:
    """Also those that vLLM's prefix cache has, that half consist of another one, or were lost with the server."""
    model, rng = str(save_tiny_model(tmp_path / "model")), random.Random(31)
    texts = [random_text(rng, 150) for _ in range(6)]
    texts.append(f"{texts[0][:500]} {random_text(rng, 40)}")  # two thirds are the first one's
    chunks = [TextChunk(f"c{number}", text) for number, text in enumerate(texts)]
    with LMCacheServer(tmp_path) as lmcache:
        config = BlendConfig(
            store="lmcache",
            lmcache_url=lmcache.url,
            lmcache_timeout_s=5.0,
            lmcache_http_url=lmcache.http_url,
            index_path=str(tmp_path / "known.sqlite"),
            seams=True,
        )
        with api_server(model, config, tmp_path / "server.log") as client:

            def outcomes() -> list[ChunkOutcome]:
                return list(warm(str(client.base_url), "tiny", [*chunks, TextChunk("short", "old cat")]).outcomes)

            def counts() -> list[str]:
                return [outcome.outcome for outcome in outcomes()]

            def assert_all_are_there() -> None:
                for number in range(len(texts)):
                    order = texts[number:] + texts[:number]
                    found = look_up(client, SEPARATOR.join(["tea", *order, "old cat"]))
                    assert [chunk["held"] for chunk in found if chunk.get("reason") != "too_short"] == [True] * 7
                    report = ask(client, order)["kv_transfer_params"]["kvarena"]
                    assert report["store_misses"] == 0

            assert counts() == ["warmed"] * 7 + ["too_short"]
            assert_all_are_there()
            assert counts() == ["already_there"] * 7 + ["too_short"]

            assert {chunk["scored"] for chunk in look_up(client, SEPARATOR.join(["tea", *texts]), scores=True)[1:]} == {
                False
            }
            progress: list[tuple[int, int]] = []
            with Client(str(client.base_url)) as own:
                own.score("tiny", chunks, SEPARATOR, lambda *done: progress.append(done))
            assert progress[-1][0] == progress[-1][1] > 0
            found = look_up(client, SEPARATOR.join(["tea", *texts, "old cat"]), scores=True)
            assert [chunk["scored"] for chunk in found if chunk.get("reason") != "too_short"] == [True] * 7
            chosen = {"kv_transfer_params": {"kvarena": {"policy": "stored_deviation", "ratio": 0.1}}}
            report = ask(client, texts, **chosen)["kv_transfer_params"]["kvarena"]
            assert (report["unscored_chunks"], report["store_misses"]) == (0, 0)
            assert report["num_recomputed_tokens"] > 0
            progress.clear()
            with Client(str(client.base_url)) as own:
                own.score("tiny", chunks, SEPARATOR, lambda *done: progress.append(done))
            assert progress == [(0, 0)], "all have theirs"

            report = ask(client, texts)["kv_transfer_params"]["kvarena"]
            assert report["num_seams"] == 0
            progress.clear()
            with Client(str(client.base_url)) as own:
                own.make_seams("tiny", chunks, SEPARATOR, lambda *done: progress.append(done))
            assert progress[-1][0] == progress[-1][1] > 0
            head = {
                "kv_transfer_params": {"kvarena": {"policy": "chunk_head"}}
            }  # vLLM has the prefix of the other blend
            report = ask(client, texts, **head)["kv_transfer_params"]["kvarena"]
            assert (report["num_seams"], report["store_misses"]) == (6, 0)

            lmcache.kill()
            failed = outcomes()
            assert {outcome.reason for outcome in failed[:-1]} == {"the store doesn't answer"}
            lmcache.start()
            assert counts() == ["warmed"] * 7 + ["too_short"], "prompts that vLLM's prefix cache has are sent once more"
            assert_all_are_there()
