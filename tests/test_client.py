"""The one HTTP client against a real server: what came, when it came, and every way it can end early."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest

from kvarena.client import (
    CHAT,
    COMPLETIONS,
    AsyncClient,
    Client,
    ConnectionLost,
    Refused,
    ServerInfo,
    Silent,
    StreamedAnswer,
    StreamFailed,
    Token,
    Unexpected,
    Unreachable,
    Usage,
    connect,
    error_message,
)
from kvarena.server.state import ApiConfig
from support.real_server import RealServer, serving
from support.scripted_engine import Pace, ScriptedEngine
from support.small_openai_server import SmallServer, started_servers
from support.waiting import wait_until


@pytest.fixture(scope="module")
def real() -> Iterator[RealServer[ScriptedEngine]]:
    with serving(ScriptedEngine()) as server:
        yield server


@pytest.fixture
def client(real: RealServer[ScriptedEngine]) -> Iterator[Client]:
    with Client(real.url) as opened:
        yield opened


@pytest.fixture
def small_server() -> Iterator[Callable[..., SmallServer]]:
    with started_servers() as start:
        yield start


def chat(script: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": f"\n{script}"}], "temperature": 0, **fields}


def completion(script: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": f"\n{script}", "temperature": 0, **fields}


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, chat("say the old lamp")), (COMPLETIONS, completion("say the old lamp"))]
)
def test_a_stream_with_its_usage_and_times(client: Client, path: str, body: dict[str, Any]) -> None:
    seen: list[Token] = []
    answer = client.stream(path, body, lambda so_far, token: seen.append(token), request_id="first")
    assert (answer.text, answer.finish_reason) == ("the old lamp", "stop")
    assert seen == answer.tokens
    assert answer.usage.num_prompt_tokens
    assert answer.usage.num_cached_tokens == answer.usage.num_prompt_tokens // 2
    assert answer.usage.num_output_tokens
    times = [answer.sent_s, *(token.time_s for token in answer.tokens), answer.ended_s]
    assert times == sorted(times)
    assert answer.ttft_ms > 0


def test_token_ids_for_a_prompt_and_logprobs_for_a_chat(client: Client, real: RealServer[ScriptedEngine]) -> None:
    ids = client.token_ids({"model": "tiny", "prompt": "\nsay tea"})
    assert client.stream(COMPLETIONS, completion("") | {"prompt": ids}).text == "tea"
    assert list(real.engine.requests[-1].prompt) == ids
    answer = client.stream(CHAT, chat("say tea", logprobs=True, top_logprobs=2))
    assert "".join(entry["token"] for entry in answer.logprobs) == "tea</s>"


def test_the_report_by_request_id(client: Client) -> None:
    answer = client.stream(COMPLETIONS, completion("say tea"))
    report = client.report(answer.request_id)
    assert report
    assert report["num_prompt_tokens"] == answer.usage.num_prompt_tokens
    assert client.report("nobodys") is None


def test_what_a_server_is(client: Client, small_server: Callable[..., SmallServer]) -> None:
    described = client.describe()
    assert (described.model, described.max_model_len, described.contender) == ("tiny", 4096, "scripted")
    server = small_server()
    with Client(server.url + "/v1") as other:
        assert other.describe() == ServerInfo("small", None, 4096, None)
        server.health = (503, {"error": "the engine is dead"})
        with pytest.raises(Refused, match="HTTP 503: the engine is dead"):
            other.describe()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_error_objects(client: Client, path: str) -> None:
    make = chat if path == CHAT else completion
    with pytest.raises(Refused, match="HTTP 400: refused before the first token; nothing is accepted") as refused:
        client.stream(path, make("refuse"))
    assert refused.value.status == 400
    assert refused.value.reason == "refused before the first token; nothing is accepted"
    with pytest.raises(Refused, match="HTTP 404: there is no model 'other'"):
        client.stream(path, make("say tea", model="other"))
    came: list[str] = []
    with pytest.raises(StreamFailed, match="an error in the stream: the engine failed while serving"):
        client.stream(path, make("break one two three four"), lambda answer, token: came.append(answer.text))
    assert came, "what came before the error is kept"


def test_error_objects_of_other_servers() -> None:
    assert error_message('{"error": {"message": "a"}}') == error_message({"message": "a"}) == "a"
    assert error_message('{"error": "a"}') == error_message({"detail": "a"}) == error_message("a\n") == "a"


def test_the_api_key() -> None:
    with serving(ScriptedEngine(), ApiConfig(api_key="sesame")) as locked:
        with Client(locked.url, "sesame") as client:
            assert client.describe().model == "tiny"
            assert client.stream(COMPLETIONS, completion("say tea")).text == "tea"
        for key, has in (("", "not set here"), ("other", "another one than this")):
            with Client(locked.url, key) as client, pytest.raises(Refused) as refused:
                client.stream(COMPLETIONS, completion("say tea"))
            assert refused.value.status == 401
            with pytest.raises(ValueError, match=f"mine: {locked.url} wants KVARENA_API_KEY, which is {has}"):
                connect("mine", locked.url, key)


def test_no_key_and_no_name_of_openais_environment_is_sent(
    small_server: Callable[..., SmallServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "private")
    server = small_server()
    with Client(server.url) as client:
        client.stream(CHAT, {"model": "small", "messages": []})
    assert all("private" not in value for _, _, headers in server.requests for value in headers.values())


def test_a_cancelled_stream_ends_at_the_server_and_keeps_what_came() -> None:
    pace = Pace()
    with serving(ScriptedEngine(pace=pace)) as server, Client(server.url) as client:
        kept: list[StreamedAnswer] = []
        future = client.start(client.aio.stream(CHAT, chat(""), lambda answer, token: kept.append(answer)))
        pace.let(3)
        wait_until(lambda: len(kept) == 3)
        future.cancel()
        with pytest.raises(CancelledError):
            future.result()
        wait_until(lambda: not server.engine.open)
        assert kept[-1].text
        assert len(kept[-1].tokens) == 3
        assert kept[-1].finish_reason is None
        pace.end()
        assert client.stream(CHAT, chat("")).finish_reason == "stop", "the client goes on"


def test_connections_that_break(small_server: Callable[..., SmallServer]) -> None:
    body = {"model": "small", "messages": []}
    with Client(small_server(cut_after=2).url) as client:
        kept: list[StreamedAnswer] = []
        with pytest.raises(ConnectionLost, match="broke off"):
            client.stream(CHAT, body, lambda answer, token: kept.append(answer))
        assert kept[-1].text == "Hello, "
    with Client(small_server(silence_s=30.0).url, timeout_s=0.2) as client, pytest.raises(Silent, match=r"for 0\.2 s"):
        client.stream(CHAT, body)
    gone = small_server()
    gone.stop()
    with Client(gone.url) as client:
        for ask in (client.describe, lambda: client.stream(CHAT, body)):
            with pytest.raises(Unreachable, match=f"nothing answers at {gone.url}"):
                ask()
    with pytest.raises(ValueError, match=f"there: no OpenAI server answers at {gone.url}"):
        connect("there", gone.url)


def test_answers_of_another_form(client: Client) -> None:
    with pytest.raises(Refused, match="HTTP 404"):
        client.get("/elsewhere")
    with pytest.raises(Unexpected, match="not the OpenAI API"):
        client.get("/metrics")


def test_one_client_for_many_threads_over_connections_that_stay(small_server: Callable[..., SmallServer]) -> None:
    server = small_server()
    with Client(server.url) as client:
        for _ in range(3):
            assert client.stream(CHAT, {"model": "small", "messages": []}).text == "Hello, world"
        assert server.num_connections == 1
    with serving(ScriptedEngine()) as real, Client(real.url) as client, ThreadPoolExecutor(16) as pool:
        texts = pool.map(lambda n: client.stream(COMPLETIONS, completion(f"say tea {n}")).text, range(16))
        assert list(texts) == [f"tea {n}" for n in range(16)]


def test_in_an_event_loop_of_ones_own(real: RealServer[ScriptedEngine]) -> None:
    async def ask() -> list[StreamedAnswer]:
        client = AsyncClient(real.url)
        try:
            return await asyncio.gather(*(client.stream(COMPLETIONS, completion(f"say tea {n}")) for n in range(4)))
        finally:
            await client.aclose()

    assert [answer.text for answer in asyncio.run(ask())] == [f"tea {n}" for n in range(4)]


def test_closing_a_client_ends_what_is_under_way_and_its_thread() -> None:
    with serving(ScriptedEngine(pace=Pace())) as server, ThreadPoolExecutor(1) as pool:
        with Client(server.url) as client:
            waiting = pool.submit(client.stream, CHAT, chat(""))
            wait_until(lambda: bool(server.engine.open))
        with pytest.raises(CancelledError):
            waiting.result(60)
        wait_until(lambda: not server.engine.open)
        assert f"client of {server.url}" not in [thread.name for thread in threading.enumerate()]
        client.close()


def test_reasoning_is_a_token_and_no_part_of_the_text() -> None:
    answer = StreamedAnswer(0.0)
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "yes"}]
    for number, delta in enumerate(deltas):
        list(answer.add({"id": "x", "choices": [{"delta": delta}]}, float(number)))
    list(answer.add({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}, 3.0))
    assert answer.tokens == [Token("hm", 1.0, is_reasoning=True), Token("yes", 2.0)]
    assert (answer.text, answer.usage) == ("yes", Usage(3, 2, None))


def test_the_import_is_light() -> None:
    """The stack and the servers import the API key's name from it."""
    code = "import sys, kvarena.client; print(sorted({'httpx', 'openai', 'pydantic', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
