"""The AI 100 contender over HTTP: names of conversations, streams, reports, the table of slots, what goes wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import OpenAI

from ai100.engine import AI100Engine
from ai100.runtimes.runtime import DeviceLost
from ai100.server import router
from kvarena.server.state import ApiConfig
from support.ai100_engine import AI100
from support.real_server import RealServer, serving
from support.request_lines import request_lines
from support.tiny_models import WORDS

CHAT = "/v1/chat/completions"
Served = tuple[AI100, RealServer[AI100Engine]]


@pytest.fixture
def served(make: Callable[..., AI100]) -> Iterator[Served]:
    ai100 = make()
    with serving(ai100.engine, routers=[router]) as server:
        yield ai100, server


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served[1].client() as client:
        yield client


def body(*said: str, **more: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return {"messages": messages, "max_tokens": 6, "temperature": 0} | more


def report_of(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["kv_transfer_params"]["kvarena"]
    return found


@pytest.mark.parametrize("how", ["header", "session", "history"])
def test_a_conversation_by_its_name_or_its_history(http: httpx.Client, how: str) -> None:
    headers = {"X-Conversation-Id": "mine"} if how == "header" else {}
    more = {"session_id": "me"} if how == "session" else {}
    first = http.post(CHAT, json=body("river old", **more), headers=headers).json()
    text = first["choices"][0]["message"]["content"]
    said = ("river old", text, "And the rain?") if how == "history" else ("And the rain?",)
    second = http.post(CHAT, json=body(*said, **more), headers=headers).json()
    told = report_of(second)
    assert (report_of(first)["status"], told["status"]) == ("NEW_TOPIC", "INCREMENTAL_PREFILL")
    assert (told["contender"], told["approximate"]) == ("ai100", False)
    assert (told["topic"], told["slot"], told["turn"]) == ("water", 0, 2)
    assert told["num_prefilled_tokens"] + told["num_reused_tokens"] == told["num_prompt_tokens"]
    assert told["num_decoded_tokens"] == second["usage"]["completion_tokens"]
    assert {"queue_ms", "prefill_ms", "decode_ms", "total_ms"} == told["timings"].keys()
    assert [span["source"] for span in told["spans"]] == ["reused", "computed"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == told["num_reused_tokens"] > 0


def test_a_user_is_no_conversation(http: httpx.Client) -> None:
    """`user` says who asks, for all that they ask; nobody means a conversation by it."""
    answers = [http.post(CHAT, json=body(f"river {number % 3}", user="burst")).json() for number in range(12)]
    assert {report_of(answer)["turn"] for answer in answers} == {1}
    assert {answer["usage"]["prompt_tokens"] for answer in answers} == {answers[0]["usage"]["prompt_tokens"]}


def test_openais_client_streams_what_it_gets_whole(served: Served) -> None:
    client = OpenAI(base_url=f"{served[1].url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "river bread"}]
    how: dict[str, Any] = {"model": client.models.list().data[0].id, "messages": messages}
    how |= {"max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**how)
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_topic_that_the_client_says_is_the_messages(http: httpx.Client) -> None:
    def ask(*said: str, topic: str) -> tuple[httpx.Response, dict[str, Any]]:
        more = {"kv_transfer_params": {"kvarena": {"topic": topic}}, "session_id": "said"}
        reply = http.post(CHAT, json=body(*said, **more))
        return reply, report_of(reply.json()) if reply.is_success else {}

    first, told = ask("river old", topic="mine")
    assert (told["topic"], told["status"]) == ("mine", "NEW_TOPIC")
    text = first.json()["choices"][0]["message"]["content"]
    _, told = ask("river old", text, "bread", topic="mine")
    assert (told["topic"], told["turn"], told["status"]) == ("mine", 2, "INCREMENTAL_PREFILL")
    _, corrected = ask("river old", text, "bread", topic="food")
    assert (corrected["topic"], corrected["turn"]) == ("food", 1)
    assert ask("river", topic=" ")[0].status_code == 400


def topic(http: httpx.Client, *said: str, **more: Any) -> tuple[str, bool]:
    told = http.post("/topic", json=body(*said, **more)).raise_for_status().json()
    return told["topic"], told["is_new"]


def test_a_topic_is_foretold_as_it_is_then_found(http: httpx.Client) -> None:
    """With a name and without, for a new topic, an old one, and a message that refers back."""
    history: list[str] = []
    for question in ("river old", "bread", "And the rain?", "goat hill", "And why?"):
        named = topic(http, question, session_id="foretold")
        found = report_of(http.post(CHAT, json=body(question, session_id="foretold")).json())
        assert named == (found["topic"], found["status"] == "NEW_TOPIC")
        assert topic(http, *history, question)[0] == found["topic"]
        answer = http.post(CHAT, json=body(*history, question)).json()
        assert report_of(answer)["topic"] == found["topic"]
        history += [question, answer["choices"][0]["message"]["content"]]


def test_foretelling_a_topic_changes_nothing(served: Served, http: httpx.Client) -> None:
    engine = served[0].engine
    first = report_of(http.post(CHAT, json=body("river", session_id="me")).json())
    text = http.post(CHAT, json=body("bread")).json()["choices"][0]["message"]["content"]
    before = (http.get("/slots").json(), list(engine.memory._conversations), len(served[0].runtime.prefills))
    for said in (("goat",), ("cat hill",), ("bread", text, "tea"), ("bread", "another answer", "tea"), ("x", "y", "z")):
        for named in ({}, {"session_id": "me"}, {"session_id": "new"}):
            topic(http, *said, **named)
    assert (http.get("/slots").json(), list(engine.memory._conversations), len(served[0].runtime.prefills)) == before
    following = report_of(http.post(CHAT, json=body("rain", session_id="me")).json())
    assert (following["topic"], following["turn"]) == (first["topic"], 2)
    assert following["status"] == "INCREMENTAL_PREFILL"
    engine.batcher.slots.check_integrity()


def test_a_foretold_topic_is_never_another_users(http: httpx.Client) -> None:
    secret = {"kv_transfer_params": {"kvarena": {"topic": "my secret"}}}
    http.post(CHAT, json=body("river", session_id="same", cache_salt="mine", **secret))
    assert topic(http, "And why?", session_id="same", cache_salt="mine") == ("my secret", False)
    for more in ({"cache_salt": "theirs"}, {}):
        assert topic(http, "And why?", session_id="same", **more)[1]
        assert topic(http, "And why?", session_id="same", **more)[0] != "my secret"
        assert topic(http, "river", session_id="same", **more) == ("water", True)


@pytest.mark.parametrize(
    ("request_body", "status"),
    [
        (body(""), 400),
        (body(" \n"), 400),
        (body("river", cache_salt="a/b"), 400),
        (body("river", session_id=3), 400),
        (body("river", model="other"), 404),
        ({"messages": []}, 400),
        ({"messages": [{"role": "user", "content": None}]}, 400),
        ({"messages": [{"role": "user"}] * 3}, 200),
        ({}, 400),
    ],
)
def test_a_topic_is_foretold_for_what_can_be_asked(
    http: httpx.Client, request_body: dict[str, Any], status: int
) -> None:
    for path in ("/topic", CHAT):
        reply = http.post(path, json=request_body)
        assert reply.status_code == status, reply.text
        assert status == 200 or reply.json()["error"]["message"]


def test_foretelling_asks_for_the_key_and_bounds_its_body(make: Callable[..., AI100]) -> None:
    with serving(make().engine, ApiConfig(api_key="secret"), routers=[router]) as server, server.client() as client:
        assert client.post("/topic", json=body("river")).status_code == 401
        known = {"Authorization": "Bearer secret"}
        assert client.post("/topic", json=body("river"), headers=known).json() == {"topic": "water", "is_new": True}
        assert client.post("/topic", json=body("goat " * (1 << 20)), headers=known).status_code == 413
        assert client.post("/topic", content=b"{", headers=known).status_code == 400


def test_the_report_of_a_stream_is_kept(http: httpx.Client) -> None:
    with http.stream("POST", CHAT, json=body("river", stream=True)) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    told = http.get(f"/kvarena/requests/{json.loads(lines[0])['id']}").json()
    assert (told["topic"], told["status"]) == ("water", "NEW_TOPIC")


def test_the_table_of_slots_and_the_settings(http: httpx.Client) -> None:
    for text in ("river", "bread"):
        http.post(CHAT, json=body(text, session_id="me"))
    table = http.get("/slots").json()
    assert [row["topic"] for row in table["slots"]] == ["water", "food", None, None]
    assert [row["is_aside"] for row in table["slots"]] == [False, False, False, True]
    assert all(row["position"] > 0 and row["has_pending_token"] for row in table["slots"][:2])
    assert (table["ctx_len"], table["num_evictions"]) == (512, 0)
    told = http.get("/kvarena").json()
    assert (told["contender"], told["runtime"], told["kv_cache_batch_size"]) == ("ai100", "host", 4)
    assert told["defaults"] == {"use_cache": True}
    metrics = http.get("/metrics").text
    assert 'kvarena_prompt_tokens_total{engine="0",model_name="llama",origin="computed"}' in metrics


def test_without_the_cache(make: Callable[..., AI100], http: httpx.Client) -> None:
    off = {"kv_transfer_params": {"kvarena": {"use_cache": False}}}
    texts = []
    for more in ({"session_id": "a"}, {"session_id": "b", **off}):
        answers = [http.post(CHAT, json=body(text, **more)).json() for text in ("river", "And the rain?")]
        texts.append([answer["choices"][0]["message"]["content"] for answer in answers])
        assert report_of(answers[1])["cache_enabled"] == ("kv_transfer_params" not in more)
    assert texts[0] == texts[1]
    with serving(make(use_cache=False).engine, routers=[router]) as server, server.client() as client:
        answers = [client.post(CHAT, json=body(text, session_id="a")).json() for text in ("river", "And the rain?")]
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == texts[0]
    assert [report_of(answer)["status"] for answer in answers] == ["FULL_PREFILL"] * 2


@pytest.mark.parametrize(
    ("request_body", "says"),
    [
        (body(""), "empty"),
        (body("goat " * 700), "512"),
        (body("goat", max_tokens=2000), "512"),
        (body("goat", kv_transfer_params={"kvarena": {"slot": 1}}), "use_cache"),
        (body("goat", n=2, session_id="me", temperature=1), "n is 2"),
        ({"messages": []}, "messages"),
    ],
)
def test_bad_requests_get_an_error_object(http: httpx.Client, request_body: dict[str, Any], says: str) -> None:
    for stream in (False, True):
        reply = http.post(CHAT, json=request_body | {"stream": stream})
        assert reply.status_code == 400, reply.text
        assert says in reply.json()["error"]["message"]
    assert all(row["topic"] is None for row in http.get("/slots").json()["slots"])


def test_several_samples_and_text_completions(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=body("river", n=3, temperature=1, seed=4)).json()
    assert len(answer["choices"]) == 3
    prompts = {"prompt": ["tea rain", "goat hill"], "max_tokens": 3, "temperature": 0}
    assert len(http.post("/v1/completions", json=prompts).json()["choices"]) == 2


def test_a_stop_string_ends_the_turn_and_the_chat_goes_on(served: Served, http: httpx.Client) -> None:
    text = http.post(CHAT, json=body("river", max_tokens=12)).json()["choices"][0]["message"]["content"]
    stop = next(text[at : at + 2] for at in range(3, len(text)) if "\ufffd" not in text[at : at + 2])
    for _ in range(2):
        cut = http.post(CHAT, json=body("river", max_tokens=12, stop=stop)).json()["choices"][0]
        assert (cut["finish_reason"], cut["message"]["content"]) == ("stop", text[: text.index(stop)])
    following = http.post(CHAT, json=body("river", cut["message"]["content"], "rain")).json()
    assert report_of(following)["status"] == "INCREMENTAL_PREFILL"
    assert not any(row["in_use"] for row in http.get("/slots").json()["slots"])
    served[0].engine.batcher.slots.check_integrity()


def test_a_client_that_goes_away_frees_its_slot(served: Served, http: httpx.Client) -> None:
    """One whose whole answer would take its device far longer than the test waits."""
    served[0].runtime.before = lambda kind, slots: time.sleep(0.05)
    endless = body("river", max_tokens=480, ignore_eos=True, stream=True)
    with http.stream("POST", CHAT, json=endless) as reply:
        next(line for line in reply.iter_lines() if line)
    stops_by = time.monotonic() + 10
    while any(row["in_use"] for row in http.get("/slots").json()["slots"]):
        assert time.monotonic() < stops_by
        time.sleep(0.05)
    assert len(served[0].runtime.decodes) < 470
    served[0].runtime.before = lambda kind, slots: None
    assert http.post(CHAT, json=body("river")).is_success


def test_a_lost_device_is_told_and_the_next_request_is_served(served: Served, http: httpx.Client) -> None:
    runtime = served[0].runtime
    expected = http.post(CHAT, json=body("river")).json()["choices"][0]["message"]["content"]

    def lose(kind: str, slots: object) -> None:
        if len(runtime.decodes) > num_decodes + 2:
            runtime.before = lambda kind, slots: None
            raise DeviceLost("the card is gone")

    for stream in (False, True):
        num_decodes = len(runtime.decodes)
        runtime.before = lose
        reply = http.post(CHAT, json=body("river", stream=stream))
        assert "the card is gone" in reply.text
        assert (reply.status_code == 503) != stream
    assert http.post(CHAT, json=body("river")).json()["choices"][0]["message"]["content"] == expected


def test_twelve_users_at_once(served: Served, http: httpx.Client) -> None:
    def talk(user: int, name: str) -> list[str]:
        said = []
        for text in (WORDS[user % 6], "And why?"):
            answer = http.post(CHAT, json=body(text, session_id=f"{name}{user}", max_tokens=3)).json()
            said.append(answer["choices"][0]["message"]["content"])
        return said

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda user: talk(user, "together"), range(12)))
    assert answers[:6] == answers[6:]
    assert answers[:2] == [talk(user, "alone") for user in range(2)]
    served[0].engine.batcher.slots.check_integrity()


def test_the_log_has_a_line_with_the_slot_and_nothing_that_was_said(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="kvarena"):
        http.post(CHAT, json=body("river"))
        (line,) = request_lines(caplog, at_least=1)
    assert (line["status"], line["details"]["status"]) == (200, "NEW_TOPIC")
    assert (line["details"]["slot"], line["details"]["turn"]) == (0, 1)
    assert "water" not in caplog.text
