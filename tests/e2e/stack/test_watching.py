"""The running stack as somebody who looks after it sees it: keys, request ids, log lines, metrics, the dashboard."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvarena.client import CHAT, Client
from kvarena.documents import build_messages, load_chunks
from kvarena.home import Home
from kvarena.stack.processes import processes_of
from kvarena.stack.record import read_record
from support.dashboard import metrics_of_queries, missing, queries
from support.prometheus_server import prometheus
from support.request_lines import lines_of
from support.running_stack import Stack
from support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]
DATA = Path(__file__).parents[3] / "backend" / "models" / "town" / "notes"
TEXTS = [chunk.text for chunk in load_chunks(DATA)]
VLLMS = ("blend", "plain")
UP = "max by (contender) (up"


def body(texts: list[str], **more: Any) -> dict[str, Any]:
    messages = build_messages("Be brief.", texts, "What does she keep?", "<note>")
    return {"model": "town", "messages": messages, "temperature": 0, "max_tokens": 4, **more}


def line_of(stack: Stack, name: str, request_id: str) -> dict[str, Any]:
    """The only one of a request; it may come a moment after its answer."""
    stops_by = time.monotonic() + 10
    while True:
        log = stack.command("logs", name, "-n", "200").stdout
        found = [line for line in lines_of(log) if line["request_id"] == request_id]
        if found or time.monotonic() > stops_by:
            (line,) = found
            return line
        time.sleep(0.2)


@pytest.fixture
def api_key(stack: Stack) -> str:
    if not stack.api_key:
        pytest.skip("this stack was started without a key")
    return stack.api_key


@pytest.mark.parametrize("name", VLLMS)
def test_every_path_asks_for_the_key_but_health_and_metrics(stack: Stack, name: str, api_key: str) -> None:
    ours = ("/kvarena", "/kvarena/requests/chatcmpl-x") if name == "blend" else ()
    with httpx.Client(base_url=stack.address(name), timeout=60, trust_env=False) as stranger:
        for headers in ({}, {"authorization": f"Bearer {api_key}x"}, {"authorization": api_key}):
            for path in ("/v1/models", "/version", "/openapi.json", *ours):
                assert stranger.get(path, headers=headers).status_code == 401
            for path in (CHAT, "/tokenize", "/invocations"):
                refused = stranger.post(path, json=body(TEXTS[:1]), headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["type"] == "AuthenticationError"
        assert stranger.get("/health").is_success
        assert "vllm:" in stranger.get("/metrics").text
    with stack.client(name) as http:
        assert http.get("/v1/models").is_success
        assert http.post(CHAT, json=body(TEXTS[:1])).is_success


def test_the_key_shows_nowhere(stack: Stack, api_key: str) -> None:
    home = Home(stack.home)
    command_lines = [" ".join(process.cmdline()) for process in processes_of(home)]
    assert any("vllm" in line for line in command_lines)
    shown = [*command_lines, stack.command("status").stdout, stack.command("status", "--json").stdout]
    shown += [path.read_text(errors="replace") for path in [*home.logs.iterdir(), home.record, home.daemon_config]]
    assert not [text[:80] for text in shown if api_key in text]


def test_commands_of_this_project_show_the_key(stack: Stack) -> None:
    warmed = stack.command("warm", "--json")
    assert warmed.returncode == 0, warmed.stdout + warmed.stderr
    stranger = Stack(stack.home)
    if stack.api_key:
        refused = stranger.command("warm")
        assert refused.returncode == 1
        assert "refuses KVARENA_API_KEY" in refused.stderr


@pytest.mark.parametrize("stream", [False, True])
def test_a_question_has_one_id_on_its_way_through_all_servers(stack: Stack, stream: bool) -> None:
    request_id = f"question-{time.time_ns()}"
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    lines = {}
    for name in VLLMS:
        with stack.client(name) as http:
            request = body(TEXTS[:3], cache_salt=request_id, **options)  # nobody else's chunks
            reply = http.post(CHAT, json=request, headers={"X-Request-Id": request_id})
            assert reply.headers["x-request-id"] == request_id
            assert f'"chatcmpl-{request_id}"' in reply.text
            lines[name] = line_of(stack, name, request_id)
            if name == "blend":
                report = http.get(f"/kvarena/requests/chatcmpl-{request_id}").json()
    for name, line in lines.items():
        assert (line["contender"], line["id"]) == (name, f"chatcmpl-{request_id}")
        assert (line["status"], line["num_generated_tokens"]) == (200, 4)
        assert ("ttft_ms" in line) == stream
        parts = [line[f"num_{part}_tokens"] for part in ("reused", "recomputed", "computed")]
        assert sum(parts) == line["num_prompt_tokens"] == report["num_prompt_tokens"]
    assert lines["blend"]["num_reused_tokens"] == report["num_reused_tokens"]
    assert lines["blend"]["details"]["store_misses"] == report["store_misses"] == 3
    assert lines["blend"]["details"]["blend_failures"] == 0
    for name in VLLMS:
        assert TEXTS[0][:30] not in stack.command("logs", name, "-n", "200").stdout


def test_vllm_tells_where_its_time_went_and_what_memory_all_its_processes_have(stack: Stack) -> None:
    for name in VLLMS:
        with Client(stack.address(name), stack.api_key) as client:
            answer = client.stream(CHAT, body(TEXTS[:2], cache_salt=str(time.time_ns())))  # in no cache
            report = client.report(answer.request_id) if name == "blend" else None
        with stack.client(name) as http:
            told = http.get("/metrics").text
        queue_ms, prefill_ms = (answer.timings[key] for key in ("queue_time_ms", "time_to_first_token_ms"))
        assert queue_ms >= 0
        assert prefill_ms > 0
        assert queue_ms + prefill_ms <= answer.ttft_ms
        if report:
            assert not report["in_pieces"]
            assert 0 < report["blend_ms"] < prefill_ms, "the blend is done in the request's turn"
            assert report["lookup_ms"] + queue_ms + prefill_ms <= answer.ttft_ms
        memory = dict(re.findall(r"^(kvarena_server|process_resident)_memory_bytes (\S+)$", told, re.MULTILINE))
        assert float(memory["kvarena_server"]) > 1.2 * float(memory["process_resident"]), (
            "the engine is another process"
        )


def test_an_id_that_is_of_no_use_is_replaced(stack: Stack) -> None:
    for name in VLLMS:
        with stack.client(name) as http:
            reply = http.post(CHAT, json=body(TEXTS[:1]), headers={"X-Request-Id": "x" * 5000})
        assert len(reply.headers["x-request-id"]) == 32
        assert reply.json()["id"] == f"chatcmpl-{reply.headers['x-request-id']}"


def scraped(stack: Stack) -> dict[str, str]:
    """The addresses of all that `targets.yml` names and this stack has."""
    record = read_record(Home(stack.home))
    lmcache = record.service("lmcache-server") if record else None
    assert lmcache is not None
    (http_port,) = lmcache.other_ports
    return {name: stack.address(name) for name in VLLMS} | {"lmcache-server": f"http://127.0.0.1:{http_port}"}


def test_every_metric_of_the_dashboard_is_there(stack: Stack) -> None:
    with stack.client("blend") as blend, stack.client("plain") as plain:
        for texts in (TEXTS[4:7], TEXTS[6:3:-1]):
            blend.post(CHAT, json=body(texts)).raise_for_status()
        plain.post(CHAT, json=body(TEXTS[:1])).raise_for_status()
        of_lmcache = {metric for metric in metrics_of_queries() if metric.startswith("lmcache_")}
        own = {metric for metric in metrics_of_queries() if metric.startswith("kvarena_")}
        wait_until(lambda: missing(blend.get("/metrics").text) <= {"kvarena_store_bytes", *of_lmcache})
        wait_until(lambda: missing(plain.get("/metrics").text) <= own | of_lmcache)
        expositions = [blend.get("/metrics").text, plain.get("/metrics").text]
    lmcache = httpx.get(f"{scraped(stack)['lmcache-server']}/metrics", trust_env=False).text
    assert missing(expositions[0]) == {"kvarena_store_bytes", *of_lmcache}, "LMCache has the blend's chunks"
    assert missing(expositions[1]) == own | of_lmcache
    assert "lmcache_mp_l1_memory_usage_bytes" not in missing(lmcache)


def test_the_dashboard_over_a_real_prometheus(stack: Stack, tmp_path: Path) -> None:
    with prometheus(tmp_path, scraped(stack)) as watched:
        assert watched.wait_for("count_over_time(up[1m])", lambda seen: min(seen.values(), default=0) >= 2)
        with stack.client("blend") as blend, stack.client("plain") as plain:
            for http in (blend, plain):
                for texts in (TEXTS[7:10], TEXTS[9:6:-1]):
                    http.post(CHAT, json=body(texts)).raise_for_status()
        (generated,) = [query for query in queries() if "vllm:generation_tokens_total" in query]
        seen = watched.wait_for(generated, lambda values: sum(value > 0 for value in values.values()) == 2)
        assert {name for (name,), value in seen.items() if value > 0} == set(VLLMS)
        up = {(name,): 1.0 for name in scraped(stack)}
        results = {query: watched.values(query) for query in queries() if not query.startswith(UP)}
        for query in (query for query in queries() if query.startswith(UP)):
            assert watched.wait_for(query, lambda values: values == up) == up
    for query, values in results.items():
        if "histogram_quantile" in query:
            assert {name for (name,) in values} == set(VLLMS)
            assert all(value > 0 for value in values.values())
        if "prompt_tokens_cached" in query:
            assert values["blend",] > 0.3
        if "lmcache_mp_l1_memory_usage_bytes" in query:
            assert values["lmcache-server",] > 0
