"""The Sim-LLM contender over HTTP: reports, choices of a request, its own paths, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from kvarena.contenders.simllm.engine import SimLLMEngine
from kvarena.contenders.simllm.http import router
from kvarena.engines.store_metrics import StoreCollector
from support.real_server import RealServer, serving
from support.request_lines import request_lines
from support.simllm_engine import served
from support.simllm_tasks import prompt_of
from support.store_metrics import store_metrics

EARLIER, LATER = prompt_of(0), f"{prompt_of(0)} goat tea"


@pytest.fixture
def server(folder: Path) -> Iterator[RealServer[SimLLMEngine]]:
    engine = served(folder, "aligned").engine
    with serving(engine, routers=[router], collectors=[StoreCollector(engine)]) as server:
        yield server


@pytest.fixture
def http(server: RealServer[SimLLMEngine]) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def ask(http: httpx.Client, prompt: str, options: object = None, **more: object) -> httpx.Response:
    body: dict[str, object] = {"prompt": prompt, "max_tokens": 5, "temperature": 0, "ignore_eos": True, **more}
    if options is not None:
        body["kv_transfer_params"] = {"kvarena": options}
    return http.post("/v1/completions", json=body)


def report_of(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["kv_transfer_params"]["kvarena"]
    return found


def test_a_hit_and_its_report(http: httpx.Client) -> None:
    miss, hit = report_of(ask(http, EARLIER)), ask(http, LATER)
    report = report_of(hit)
    assert (miss["contender"], miss["hit"], miss["similarity"]) == ("simllm", False, None)
    assert "matched_prompt" not in miss
    assert (report["mode"], report["similarity_threshold"], report["hit"]) == ("aligned", 0.95, True)
    assert report["matched_prompt"] == EARLIER
    assert report["num_matched_prompt_tokens"] == miss["num_prompt_tokens"]
    assert 0.95 <= report["similarity"] <= 1
    assert report["num_layer_passes"] < report["num_layer_passes_without_reuse"] == 4 * report["num_prompt_tokens"]
    assert hit.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == report["num_reused_tokens"] > 0
    assert http.get(f"/kvarena/requests/{hit.json()['id']}").json() == report


def test_modes_by_request(http: httpx.Client) -> None:
    ask(http, EARLIER)
    aligned, top_layer = (report_of(ask(http, LATER, {"mode": mode})) for mode in ("aligned", "top_layer"))
    assert (aligned["mode"], aligned["approximate"]) == ("aligned", False)
    assert (top_layer["mode"], top_layer["approximate"]) == ("top_layer", True)
    assert top_layer["spans"] == [{"start": 0, "end": top_layer["num_prompt_tokens"], "source": "reused"}]


def test_without_reuse(http: httpx.Client) -> None:
    ask(http, EARLIER)
    report = report_of(ask(http, EARLIER, {"reuse": False}))
    assert (report["hit"], report["reuse_enabled"], report["num_reused_tokens"]) == (False, False, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "bottom_layer"}, "'aligned', 'top_layer' or 'sandwich'"),
        ({"mode": 1}, "'aligned', 'top_layer' or 'sandwich'"),
        ({"similarity_threshold": 1.5}, "less than or equal to 1"),
        ({"similarity_threshold": -2}, "greater than or equal to -1"),
        ({"similarity_threshold": "high"}, "valid number"),
        ({"similarity_threshold": True}, "valid number"),
        ({"reuse": "no"}, "boolean"),
        ({"policy": "none"}, "reuse, mode, similarity_threshold"),
        ("aligned", "must be an object"),
    ],
)
def test_bad_options_get_the_choices(http: httpx.Client, options: object, says: str) -> None:
    reply = ask(http, EARLIER, options)
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]
    assert http.get("/tasks/stats").json()["num_searches"] == 0


@pytest.mark.parametrize(("prompt", "says"), [("", "at least 1 character"), (EARLIER * 60, "2048")])
def test_prompts_that_cannot_be_served(http: httpx.Client, prompt: str, says: str) -> None:
    reply = ask(http, prompt)
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


def test_what_is_kept_and_forgetting_it(http: httpx.Client) -> None:
    kept = report_of(ask(http, EARLIER))
    stats = http.get("/tasks/stats").json()
    kv_bytes = kept["num_prompt_tokens"] * 2 * 64 * 4  # keys and values of 2 heads of 32, fp32, in one layer
    assert stats["num_bytes"] == (4 + 1) * kv_bytes, "all four layers, and the last one for mode top_layer"
    assert (stats["cache_size"], stats["max_cache_size"], stats["num_misses"]) == (1, 100, 1)
    assert stats["auto_threshold"] is None, "the threshold is a number"
    assert http.post("/tasks/clear").json() == {"cleared": True}
    stats = http.get("/tasks/stats").json()
    assert (stats["cache_size"], stats["num_bytes"], stats["num_searches"]) == (0, 0, 0)
    assert not report_of(ask(http, LATER))["hit"]


def test_a_server_that_finds_its_own_threshold(folder: Path) -> None:
    """It starts by comparing: the request that would hit is answered by full prefill, as the report says."""
    engine = served(folder, "aligned", "auto").engine
    with serving(engine, routers=[router]) as server, server.client() as http:
        assert http.get("/kvarena").json()["defaults"]["similarity_threshold"] == "auto"
        report_of(ask(http, EARLIER))
        compared = report_of(ask(http, LATER))
        assert (compared["hit"], compared["approximate"], compared["similarity_threshold"]) == (False, False, 1.0)
        assert compared["check"] == {"similarity": pytest.approx(0.99, abs=0.01), "agrees": True}
        of_other_mode = report_of(ask(http, LATER, {"mode": "top_layer"}))
        chosen = report_of(ask(http, LATER, {"similarity_threshold": 0.9}))
        assert [(report["hit"], report["check"]) for report in (of_other_mode, chosen)] == [(True, None)] * 2
        stats = http.get("/tasks/stats").json()
        assert (stats["similarity_threshold"], stats["num_hits"], stats["num_misses"]) == (1.0, 2, 2)
        found = stats["auto_threshold"]
        assert (found["threshold"], found["num_samples"], found["target_agreement"]) == (1.0, 1, 0.95)


def test_metrics_are_the_caches(http: httpx.Client) -> None:
    for prompt in (EARLIER, LATER, LATER):
        ask(http, prompt)
    stats = http.get("/tasks/stats").json()
    assert (stats["num_hits"], stats["num_misses"], stats["cache_size"]) == (2, 1, 2)
    assert store_metrics(http) == {
        "lookups_total hits": 2,
        "lookups_total misses": 1,
        "evictions_total": 0,
        "errors_total": 0,
        "entries": 2,
        "bytes": stats["num_bytes"],
    }


def test_the_log_has_a_line_for_each_request_and_nobodys_prompt(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="kvarena"):
        ask(http, EARLIER)
        ask(http, LATER)
        _, line = request_lines(caplog, at_least=2)
    details = line["details"]
    assert not line["approximate"]
    assert (details["mode"], details["similarity_threshold"], details["hit"]) == ("aligned", 0.95, True)
    assert details["similarity"] > 0.9
    assert details["num_layer_passes"] > 0
    assert EARLIER[:20] not in caplog.text


def test_openais_client_in_a_stream(server: RealServer[SimLLMEngine], http: httpx.Client) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    first = client.chat.completions.create(messages=[{"role": "user", "content": EARLIER}], **body)
    chunks = list(
        client.chat.completions.create(
            messages=[{"role": "user", "content": EARLIER}], stream=True, stream_options={"include_usage": True}, **body
        )
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == first.choices[0].message.content, "the very same prompt is answered alike"
    report = http.get(f"/kvarena/requests/{chunks[0].id}").json()
    assert (report["hit"], report["approximate"]) == (True, False)
    assert report["matched_prompt"].startswith(EARLIER)


def test_settings_are_told(http: httpx.Client) -> None:
    told = http.get("/kvarena").json()
    assert told["contender"] == "simllm"
    assert told["modes"] == ["aligned", "sandwich", "top_layer"]
    assert told["defaults"] == {"reuse": True, "mode": "aligned", "similarity_threshold": 0.95}
    assert json.dumps(told)
