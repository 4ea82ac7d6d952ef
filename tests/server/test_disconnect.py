"""A client that goes away ends its generation at once: streamed or not, before the first token, or still waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from kvarena.server.state import ApiConfig
from support.real_server import RealServer, serving
from support.scripted_engine import ScriptedEngine
from support.waiting import wait_until

TEXT = "/v1/completions"


def gauge(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.mark.parametrize(("script", "stream"), [("block", False), ("block", True), ("forever", False)])
def test_a_generation_ends_with_its_client(real: RealServer[ScriptedEngine], script: str, stream: bool) -> None:
    with real.client() as other:
        label = 'vllm:request_success_total{engine="0",finished_reason="abort"'
        aborted = gauge(other, label)
        counted = gauge(other, "kvarena_prompt_tokens_total")
        request = {"prompt": script, "stream": stream, "max_tokens": 4000}
        named = {"X-Request-Id": f"given-up-{script}-{stream}"}
        with real.client() as http, pytest.raises(httpx.ReadTimeout):
            http.post(TEXT, json=request, headers=named, timeout=httpx.Timeout(5, read=2))
        wait_until(lambda: not real.engine.open, "a generation is still open")
        wait_until(lambda: gauge(other, "vllm:num_requests_running") == 0, "a request still counts as running")
        wait_until(lambda: gauge(other, label) == aborted + 1, "it doesn't count as aborted")
        report = other.get(f"/kvarena/requests/cmpl-{named['X-Request-Id']}").raise_for_status().json()
        assert report["num_prompt_tokens"] == gauge(other, "kvarena_prompt_tokens_total") - counted > 0


def test_a_client_that_reads_a_part_of_a_stream(real: RealServer[ScriptedEngine]) -> None:
    request = {"prompt": "forever", "stream": True, "max_tokens": 4000}
    with real.client() as http, http.stream("POST", TEXT, json=request) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        assert real.engine.open
        reply.close()
    wait_until(lambda: not real.engine.open, "a generation is still open")


def test_one_that_waits_for_its_turn() -> None:
    """It never reaches the engine; those behind it take its place."""
    with serving(ScriptedEngine(), ApiConfig(max_running=1)) as real, real.client() as http:

        async def ask() -> None:
            async with httpx.AsyncClient(base_url=real.url, trust_env=False, timeout=10) as client:
                running = asyncio.create_task(client.post(TEXT, json={"prompt": "block"}))
                await until(lambda: len(real.engine.open) == 1)
                waiting = asyncio.create_task(client.post(TEXT, json={"prompt": "say never"}))
                await until(lambda: gauge(http, "vllm:num_requests_waiting") == 1)
                last = asyncio.create_task(client.post(TEXT, json={"prompt": "say last"}))
                await until(lambda: gauge(http, "vllm:num_requests_waiting") == 2)
                waiting.cancel()
                await until(lambda: gauge(http, "vllm:num_requests_waiting") == 1)
                running.cancel()
                assert (await last).json()["choices"][0]["text"] == "last"

        asyncio.run(ask())
        assert [request.prompt for request in real.engine.requests] == ["block", "say last"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.005)


def test_the_server_ends_running_generations() -> None:
    with serving(ScriptedEngine()) as real:

        async def ask() -> tuple[httpx.Response, list[str]]:
            endless = {"prompt": "forever", "stream": True, "max_tokens": 4000}
            async with httpx.AsyncClient(base_url=real.url, trust_env=False, timeout=20) as client:
                whole = asyncio.create_task(client.post(TEXT, json={"prompt": "block"}))
                async with client.stream("POST", TEXT, json=endless) as reply:
                    lines = reply.aiter_lines()
                    assert (await anext(lines)).startswith("data: ")
                    await until(lambda: len(real.engine.open) == 2)
                    real.server.should_exit = True
                    return await whole, [line async for line in lines if line]

        whole, lines = asyncio.run(ask())
    assert whole.status_code == 503
    assert "shutting down" in whole.json()["error"]["message"]
    assert "shutting down" in lines[-2]
    assert lines[-1] == "data: [DONE]"
    assert real.engine.closed
    assert not real.engine.open
