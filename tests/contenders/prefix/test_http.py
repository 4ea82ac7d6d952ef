"""The prefix contender over HTTP: its own paths, OpenAI's, and what goes wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from kvarena.contenders.prefix.engine import PrefixEngine
from kvarena.contenders.prefix.http import router
from kvarena.engines.store_metrics import StoreCollector
from support.prefix_engine import make_prefix
from support.real_server import RealServer, serving
from support.request_lines import request_lines
from support.store_metrics import store_metrics
from support.tiny_models import WORDS

TEXT = " ".join(WORDS * 8)


@pytest.fixture
def server(model_folders: dict[str, Path]) -> Iterator[RealServer[PrefixEngine]]:
    engine = make_prefix(model_folders["llama"]).engine
    with serving(engine, routers=[router], collectors=[StoreCollector(engine)]) as server:
        yield server


@pytest.fixture
def http(server: RealServer[PrefixEngine]) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_generate_and_the_caches_figures(http: httpx.Client) -> None:
    body = {"prompt": TEXT, "max_new_tokens": 5, "ignore_eos": True}
    cold, warm = (http.post("/generate", json=body).json() for _ in range(2))
    assert warm["text"] == cold["text"]
    assert (cold["prefix_cache_hit"], warm["prefix_cache_hit"]) == (False, True)
    assert (cold["cache_enabled"], cold["num_answer_tokens"]) == (True, 5)
    assert warm["timings"]["prefix_tokens_saved"] == warm["num_prompt_tokens"]
    assert warm["timings"]["prefill_ms"] == 0
    needed = {"tokenize_ms", "cache_lookup_ms", "ttft_ms", "decode_ms", "total_ms", "prefix_tokens_saved"}
    assert needed <= cold["timings"].keys()
    assert cold["latency_ms"] >= cold["timings"]["first_token_ms"] > 0
    assert cold["tokens_per_sec"] > 0
    stats = http.get("/cache/stats").json()
    assert (stats["hits"], stats["misses"], stats["hit_rate"], stats["total_requests"]) == (1, 1, 0.5, 2)
    assert stats["cache_size"] >= 1
    assert stats["tokens_saved"] == warm["num_prompt_tokens"]
    assert isinstance(warm["timings"]["prefix_tokens_saved"], int)
    dropped = {name: stats[name] for name in ("cache_size", "num_bytes")}
    assert http.post("/cache/clear").json() == {"status": "success", "cleared": True, **dropped}
    cleared = http.get("/cache/stats").json()
    assert cleared == stats | {"cache_size": 0, "num_nodes": 0, "num_bytes": 0}, "the counts go on"
    assert not http.post("/generate", json=body).json()["prefix_cache_hit"]


def test_prefixes_that_are_too_old_are_computed_anew(model_folders: dict[str, Path]) -> None:
    engine = make_prefix(model_folders["llama"], max_age_s=0.5, max_entries=1).engine
    body = {"prompt": TEXT, "max_new_tokens": 2}
    with serving(engine, routers=[router]) as server, server.client() as http:
        answers = [http.post("/generate", json=body).json()]
        time.sleep(1)
        answers.append(http.post("/generate", json=body).json())
        stats = http.get("/cache/stats").json()
    assert [answer["prefix_cache_hit"] for answer in answers] == [False, False]
    assert answers[0]["text"] == answers[1]["text"]
    assert (stats["evictions_ttl"], stats["expirations"], stats["cache_size"]) == (1, 1, 1)
    assert engine.describe()["max_age_s"] == 0.5


def test_the_answer_says_why_nothing_was_reused(http: httpx.Client) -> None:
    def reason(**body: object) -> str | None:
        answer = http.post("/generate", json={"max_new_tokens": 1, **body})
        found: str | None = answer.json()["prefix_cache_reason"]
        return found

    assert reason(prompt=TEXT, unknown=1) == "no cached prefix of at least 20 tokens (min_tokens)"
    assert reason(prompt=TEXT) is None
    assert reason(prompt=TEXT, use_cache=False) == "use_cache is false"
    assert reason(prompt=TEXT, use_prefix_cache=False) == "use_prefix_cache is false"
    short = http.post("/generate", json={"prompt": WORDS[0], "max_new_tokens": 1.0}).json()
    told = f"prompt of {short['num_prompt_tokens']} tokens is below min_tokens 20"
    assert short["prefix_cache_reason"] == told


def test_an_answer_has_128_tokens_unless_asked_for_fewer(http: httpx.Client) -> None:
    assert http.post("/generate", json={"prompt": TEXT, "ignore_eos": True}).json()["num_answer_tokens"] == 128


def test_the_api_can_be_read_in_a_browser(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for shown in ("POST /generate", "POST /v1/chat/completions", "GET /cache/stats", "GenerateRequest"):
        assert f"<code>{shown}</code>" in page.text
    assert "max_new_tokens" in page.text
    assert "http://" not in page.text.replace("http://127.0.0.1", ""), "nothing from elsewhere"
    assert "https://" not in page.text


def test_metrics_are_the_caches(http: httpx.Client) -> None:
    for _ in range(3):
        http.post("/generate", json={"prompt": TEXT, "max_new_tokens": 2})
    stats = http.get("/cache/stats").json()
    assert store_metrics(http) == {
        "lookups_total hits": stats["hits"],
        "lookups_total misses": stats["misses"],
        "evictions_total": 0,
        "errors_total": 0,
        "entries": stats["cache_size"],
        "bytes": stats["num_bytes"],
    }
    assert (stats["hits"], stats["misses"]) == (2, 1)


@pytest.mark.parametrize("off", ["use_cache", "use_prefix_cache"])
def test_a_layer_that_is_off_changes_no_answer(http: httpx.Client, off: str) -> None:
    body = {"prompt": TEXT, "max_new_tokens": 6}
    with_all, without = (http.post("/generate", json=body | extra).json() for extra in ({}, {off: False}))
    assert without["text"] == with_all["text"]
    assert not without["prefix_cache_hit"]
    assert without["cache_enabled"] == (off != "use_cache")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": TEXT * 40}, "2048"),
        ({"prompt": TEXT, "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": TEXT, "max_new_tokens": -3}, "max_new_tokens"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": TEXT, "use_cache": "yes"}, "use_cache"),
        ({}, "prompt"),
    ],
)
def test_bad_bodies_get_an_error_object(http: httpx.Client, body: dict[str, object], says: str) -> None:
    reply = http.post("/generate", json=body)
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]
    assert http.get("/cache/stats").json()["num_nodes"] == 0


@pytest.mark.parametrize(
    ("content", "status"), [(b'{"prompt": "\xff\xfe"}', 400), (b"{", 400), (b'{"prompt": "' + b"a" * 10_000_000, 413)]
)
def test_bad_bytes(http: httpx.Client, content: bytes, status: int) -> None:
    reply = http.post("/generate", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_openais_client(server: RealServer[PrefixEngine]) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    how: dict[str, Any] = {"model": client.models.list().data[0].id, "messages": [{"role": "user", "content": TEXT}]}
    how |= {"max_tokens": 6, "temperature": 0}
    first = client.chat.completions.create(**how)
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == first.choices[0].message.content
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens


def test_the_report_by_request_id(http: httpx.Client) -> None:
    body = {"prompt": TEXT, "max_tokens": 2, "kv_transfer_params": {"kvarena": {"use_prefix_cache": False}}}
    answer = http.post("/v1/completions", json=body).json()
    report = http.get(f"/kvarena/requests/{answer['id']}").json()
    assert report == answer["kv_transfer_params"]["kvarena"]
    assert (report["contender"], report["approximate"]) == ("prefix", False)
    assert report["spans"] == [{"start": 0, "end": report["num_prompt_tokens"], "source": "computed"}]
    bad = {"prompt": TEXT, "kv_transfer_params": {"kvarena": {"policy": "none"}}}
    refused = http.post("/v1/completions", json=bad)
    assert refused.status_code == 400
    assert "use_cache, use_prefix_cache" in refused.json()["error"]["message"]


def test_a_client_that_goes_away_stops_its_generation(server: RealServer[PrefixEngine], http: httpx.Client) -> None:
    """One whose whole answer would take far longer than the test waits."""
    model = server.engine.model
    slow = model.module.register_forward_pre_hook(lambda module, arguments: time.sleep(0.02))
    body = {"prompt": TEXT, "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as reply:
        next(line for line in reply.iter_lines() if line.startswith("data:"))
    stops_by = time.monotonic() + 10
    while time.monotonic() < stops_by:
        before = model.num_forwards
        time.sleep(0.3)
        if model.num_forwards == before:
            break
    slow.remove()
    assert model.num_forwards == before < 1500
    server.engine.cache.check_integrity()
    assert http.post("/v1/completions", json=body | {"stream": False, "max_tokens": 2}).status_code == 200


def test_thirty_two_at_once(http: httpx.Client, server: RealServer[PrefixEngine]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> str:
        prompt = f"{TEXT} {WORDS[number % 4]} {WORDS[number % 3]}"
        text: str = http.post("/generate", json={"prompt": prompt, "max_new_tokens": 4}).json()["text"]
        return text

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    assert answers[:12] == answers[12:24]
    assert answers == [ask(number) for number in range(32)]
    server.engine.cache.check_integrity()


def test_the_log_has_a_line_for_each_request(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="kvarena"):
        http.post("/generate", json={"prompt": TEXT, "max_new_tokens": 2})
        (line,) = request_lines(caplog, at_least=1)
    assert line["details"]["prefix_cache_hit"] is False
    assert line["details"]["cache_lookup_ms"] >= 0


def test_settings_are_told(http: httpx.Client) -> None:
    told = http.get("/kvarena").json()
    assert told["contender"] == "prefix"
    assert told["defaults"] == {"use_cache": True, "use_prefix_cache": True}
    assert json.dumps(told)
