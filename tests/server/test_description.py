"""What a server says about itself and about its requests."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from subprocess import PIPE
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvarena.engines.base import ReportLog
from kvarena.server.state import ApiConfig
from support.real_server import RealServer, serving
from support.request_lines import request_lines
from support.scripted_engine import ScriptedEngine, ScriptedOptions, tokenizer
from support.waiting import wait_until

TEXT = "/v1/completions"


def test_health_models_and_settings(http: httpx.Client) -> None:
    assert http.get("/health").is_success
    model = http.get("/v1/models").json()["data"][0]
    assert (model["id"], model["max_model_len"]) == ("tiny", 4096)
    assert http.get("/kvarena").json() == {"contender": "scripted", "modes": ["fast", "slow"]}


@pytest.mark.parametrize("stream", [False, True])
def test_report_of_a_request(http: httpx.Client, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reply = http.post(TEXT, json={"prompt": "say tea", "stream": stream}, headers={"x-request-id": f"mine-{stream}"})
    assert reply.headers["x-request-id"] == f"mine-{stream}"
    request_id = f"cmpl-mine-{stream}"
    assert http.get(f"/kvarena/requests/{request_id}").json() == {
        "request_id": request_id,
        "contender": "scripted",
        "approximate": False,
        "num_prompt_tokens": 5,
        "num_reused_tokens": 2,
        "num_recomputed_tokens": 0,
        "num_computed_tokens": 3,
        "lookup_ms": 0.5,
        "hit": True,
    }
    (line,) = request_lines(caplog, at_least=1)
    assert [json.loads(told) for told in http.get(f"/kvarena/log/mine-{stream}").json()["lines"]] == [line]
    assert datetime.now(UTC) - datetime.fromisoformat(line.pop("time")) < timedelta(minutes=1)
    assert 0 < line.pop("ttft_ms") <= line.pop("total_ms")
    assert line == {
        "contender": "scripted",
        "request_id": f"mine-{stream}",
        "status": 200,
        "id": request_id,
        "finish": "stop",
        "approximate": False,
        "num_prompt_tokens": 5,
        "num_reused_tokens": 2,
        "num_recomputed_tokens": 0,
        "num_computed_tokens": 3,
        "num_generated_tokens": 2,
        "details": {"lookup_ms": 0.5, "hit": True},
    }


def test_the_last_reports_are_kept() -> None:
    log = ReportLog(max_reports=2)
    for name in ("a", "b-0", "c"):
        log.add({"request_id": name})
    assert log.get("a") is None
    assert log.get("b") == {"request_id": "b"}
    assert log.get("c") == {"request_id": "c"}


@pytest.mark.parametrize("given", [b"", b"a b", b"a/b", b"x" * 200, "ü".encode()])
def test_request_ids_that_could_not_be_used_are_replaced(http: httpx.Client, given: bytes) -> None:
    reply = http.get("/health", headers={b"x-request-id": given})
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
    assert http.get("/nothing", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_what_the_engine_is_asked(http: httpx.Client, real: RealServer[ScriptedEngine]) -> None:
    body: dict[str, Any] = {
        "prompt": "say tea",
        "temperature": 0,
        "top_p": 0.5,
        "seed": -3,
        "max_tokens": 7,
        "ignore_eos": True,
        "cache_salt": "tenant",
        "user": "someone",
        "session_id": "talk-0",
        "logprobs": 0,
        "kv_transfer_params": {"kvarena": {"mode": "slow"}, "other": {}},
    }
    http.post(TEXT, json=body)
    asked = real.engine.requests[-1]
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.max_tokens) == (0.0, 0.5, -3, 7)
    assert (sampling.ignore_eos, sampling.num_logprobs) == (True, 0)
    assert (asked.prompt, asked.add_special_tokens, asked.cache_salt) == ("say tea", True, "tenant")
    assert asked.options == ScriptedOptions(mode="slow")
    assert asked.conversation_id == "talk-0"

    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "say tea")]}]}
    http.post("/v1/chat/completions", json=chat | {"session_id": "x"}, headers={"x-conversation-id": "talk-1"})
    asked = real.engine.requests[-1]
    assert asked.prompt == "one\nsay tea\n"
    assert asked.messages == ({"role": "user", "content": "one\nsay tea"},)
    assert (asked.conversation_id, asked.add_special_tokens, asked.sampling.max_tokens) == ("talk-1", False, None)
    assert (asked.sampling.temperature, asked.options) == (1.0, ScriptedOptions())


def test_tokenize_and_detokenize(http: httpx.Client) -> None:
    ids = tokenizer().encode("tea 🦜")
    answer = http.post("/tokenize", json={"prompt": "tea 🦜", "return_token_strs": True}).json()
    assert answer == {
        "count": len(ids),
        "max_model_len": 4096,
        "tokens": ids,
        "token_strs": tokenizer().convert_ids_to_tokens(ids),
    }
    messages = [{"role": "user", "content": "tea"}]
    assert http.post("/tokenize", json={"messages": messages}).json()["tokens"] == tokenizer().encode("tea\n")
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "tea 🦜"}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    for path, body in (
        ("/tokenize", {"prompt": "a", "messages": messages}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": "a"}),
    ):
        assert http.post(path, json=body).status_code == 400


def test_metrics() -> None:
    with serving(ScriptedEngine()) as real, real.client() as http:
        http.post(TEXT, json={"prompt": "say tea tea tea"})
        http.post(TEXT, json={"prompt": "say tea", "max_tokens": 1, "stream": True})
        http.post(TEXT, json={"prompt": "fail"})
        http.post(TEXT, json={"prompt": "refuse"})
        reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, sample.labels.get("origin") or sample.labels.get("finished_reason")): sample
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }
    counts = [len(tokenizer().encode(text)) for text in ("say tea tea tea", "say tea", "fail", "refuse")]

    def value(name: str, label: str | None = None) -> float:
        return float(samples[name, label].value)

    assert value("vllm:prompt_tokens_total") == sum(counts)
    assert value("kvarena_prompt_tokens_total", "reused") == sum(count // 2 for count in counts)
    assert value("kvarena_prompt_tokens_total", "computed") == sum(count - count // 2 for count in counts)
    assert value("kvarena_prompt_tokens_total", "recomputed") == 0
    assert value("vllm:generation_tokens_total") == len(tokenizer().encode("tea tea tea")) + 2  # the end, "tea"
    assert value("vllm:num_requests_running") == value("vllm:num_requests_waiting") == 0
    finished = {name: value("vllm:request_success_total", name) for name in ("stop", "length", "abort", "error")}
    assert finished == {"stop": 1, "length": 1, "abort": 0, "error": 1}
    assert value("vllm:time_to_first_token_seconds_count") == 2
    assert value("vllm:e2e_request_latency_seconds_count") == 3
    assert samples["vllm:prompt_tokens_total", None].labels == {"model_name": "tiny", "engine": "0"}


def test_the_memory_of_a_server_is_that_of_all_its_processes() -> None:
    with serving(ScriptedEngine()) as real, real.client() as http:
        before = memory_told(http)
        hold = "import sys; held = bytearray(b'x') * (128 << 20); print(flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", hold], stdin=PIPE, stdout=PIPE) as engine:
            assert engine.stdout
            engine.stdout.readline()
            all_of_it, own = "kvarena_server_memory_bytes", "process_resident_memory_bytes"
            wait_until(lambda: memory_told(http)[all_of_it] - before[all_of_it] > 100 << 20)
            with_engine = memory_told(http)
            engine.communicate()
    assert before[all_of_it] > 0
    assert with_engine[own] - before[own] < 64 << 20


def memory_told(http: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {one.name: one.value for family in families for one in family.samples if "memory_bytes" in one.name}


def test_api_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = ApiConfig.from_environment({"KVARENA_API_KEY": "secret"})
    assert ApiConfig.from_environment({"KVARENA_API_KEY": ""}).api_key is None
    assert "secret" not in repr(config)
    with serving(ScriptedEngine(), config) as real, real.client() as http:
        assert http.get("/health").is_success
        assert http.get("/metrics").is_success
        for path in ("/v1/models", "/kvarena", "/nothing", "/openapi.json", "/kvarena/requests/x"):
            for header in ({}, {"authorization": "Bearer other"}, {"authorization": "secret"}):
                reply = http.get(path, headers=header)
                assert reply.status_code == 401
                assert reply.json()["error"]["type"] == "AuthenticationError"
                assert reply.headers["www-authenticate"] == "Bearer"
        body = {"prompt": "say tea"}
        assert http.post(TEXT, json=body).status_code == 401
        good = {"authorization": "Bearer secret"}
        assert http.post(TEXT, json=body, headers=good).json()["choices"][0]["text"] == "tea"
        assert http.get("/openapi.json", headers=good).json()["components"]["securitySchemes"]
    refused = [line for line in request_lines(caplog) if line["status"] == 401]
    assert [line["path"] for line in refused][:4] == ["/v1/models"] * 3 + ["/kvarena"]
    assert len(refused) == 16
    assert "secret" not in caplog.text.replace("securitySchemes", "")


def test_the_openapi_document_says_what_is_answered(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert "422" not in str([list(o["responses"]) for path in document["paths"].values() for o in path.values()])
    answers = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"400", "404", "413"} <= set(answers)
