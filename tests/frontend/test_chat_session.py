"""The HTTP of the page against a real server on loopback: figures, requests, and every way it can go wrong; and what a
contender is asked, by what it says of itself.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest

from chat_session import ChatSession
from contender_api import ContenderError, Sampling, Server, completion_request
from figures import Done, Event, Failed, FirstToken, Sent, Text
from kvarena.client import ServerInfo
from settings import Contender
from support.small_openai_server import OFFER, REPORT, SIMLLM_OFFER, SmallServer, StartServer
from support.waiting import wait_until

QUESTION = [{"role": "user", "content": "Who keeps bees?"}]
Connect = Callable[..., ChatSession]


@pytest.fixture
def connect() -> Iterator[Connect]:
    sessions: list[ChatSession] = []

    def session(url: str, api_key: str = "", timeout_s: float = 10.0) -> ChatSession:
        sessions.append(ChatSession(Contender("c", "Contender", url, report="blend"), api_key, timeout_s))
        return sessions[-1]

    yield session
    for opened in sessions:
        opened.close()


def answer(session: ChatSession, sampling: Sampling | None = None) -> list[Event]:
    """What came after the request was sent, if it was."""
    events: list[Event] = []
    session.answer(QUESTION, sampling or Sampling(), events.append, "question-1").result(timeout=20)
    return events[1:] if isinstance(events[0], Sent) else events


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def failure(events: list[Event]) -> str:
    assert isinstance(events[-1], Failed), events
    return events[-1].message


def test_plain_answer_comes_in_order_with_figures_from_usage(small_server: StartServer, connect: Connect) -> None:
    server = small_server(pieces=["Hel", "lo", ", ", "wor", "ld"], cached_tokens=30, delay_s=0.02)
    events = answer(connect(server.url))

    assert isinstance(events[0], FirstToken)
    assert text_of(events) == "Hello, world"
    done = events[-1]
    assert isinstance(done, Done)
    figures = done.figures
    assert (figures.num_prompt_tokens, figures.num_reused_tokens, figures.num_computed_tokens) == (100, 30, 70)
    assert figures.num_recomputed_tokens == 0
    assert figures.num_prefix_tokens == 30
    assert figures.approximate is False
    assert figures.num_output_tokens == 6
    assert figures.first_token_ms == events[0].first_token_ms
    assert figures.total_ms is not None
    assert figures.tokens_per_s == pytest.approx(5e3 / (figures.total_ms - figures.first_token_ms), rel=0.05)
    assert figures.total_ms >= 100


def test_first_token_is_the_first_text_and_not_the_role(small_server: StartServer, connect: Connect) -> None:
    events = answer(connect(small_server(silence_s=0.2).url))
    assert isinstance(events[0], FirstToken)
    assert events[0].first_token_ms >= 200


def test_blend_answer_has_the_figures_of_its_report_even_when_that_is_late(
    small_server: StartServer, connect: Connect
) -> None:
    done = answer(connect(small_server(offer=OFFER, num_missing_reports=2).url))[-1]
    assert isinstance(done, Done)
    figures = done.figures
    assert (figures.num_reused_tokens, figures.num_recomputed_tokens, figures.num_computed_tokens) == (70, 20, 10)
    assert (figures.approximate, figures.policy, figures.ratio) == (True, "kv_deviation", 0.15)
    assert [span.source for span in figures.spans] == ["reused", "computed"]


def test_vllms_own_times_are_stages_of_an_answer(small_server: StartServer, connect: Connect) -> None:
    timings = {"queue_time_ms": 2.5, "time_to_first_token_ms": 40.0, "tokens_per_second": 9.0}
    done = answer(connect(small_server(timings=timings).url))[-1]
    assert isinstance(done, Done)
    assert done.figures.stages == (("queue", 2.5), ("prefill", 40.0))
    selected = REPORT | {"select_ms": 3.0, "blend_ms": 5.0}
    for report, stages in (
        (selected | {"in_pieces": False}, (("queue", 2.5), ("select", 3.0), ("question", 35.0))),
        (selected, (("select", 3.0),)),
        (None, ()),
    ):
        server = small_server(offer=OFFER, timings=timings, num_missing_reports=0 if report else 100)
        server.report = report or {}
        done = answer(connect(server.url))[-1]
        assert isinstance(done, Done)
        assert done.figures.stages == stages, "a blend's prefill isn't vLLM's"


def test_a_missing_report_leaves_figures_unknown_and_never_zero(small_server: StartServer, connect: Connect) -> None:
    done = answer(connect(small_server(offer=OFFER, num_missing_reports=100).url))[-1]
    assert isinstance(done, Done)
    assert done.figures.num_reused_tokens is None
    assert done.figures.approximate is None
    assert done.figures.num_prompt_tokens == 100


def test_policy_and_ratio_go_to_blending_contenders_only(small_server: StartServer, connect: Connect) -> None:
    chosen = {"policy": "random", "ratio": 0.3}
    sampling = Sampling(temperature=0.5, max_tokens=7, ignore_eos=True, recomputing=chosen)
    blend, plain = small_server(offer=OFFER), small_server()
    for server in (blend, plain):
        answer(connect(server.url), sampling)
    (to_blend,), (to_plain,) = blend.completions(), plain.completions()
    assert to_blend.pop("kv_transfer_params") == {"kvarena": chosen}
    assert to_blend == to_plain
    assert to_plain["stream_options"] == {"include_usage": True}
    assert (to_plain["model"], to_plain["max_tokens"], to_plain["ignore_eos"]) == ("small", 7, True)


def test_api_key_is_sent_as_bearer_token(small_server: StartServer, connect: Connect) -> None:
    server = small_server()
    answer(connect(server.url, api_key="secret"))
    assert all(headers.get("authorization") == "Bearer secret" for _, _, headers in server.requests)


def test_state_follows_the_server(small_server: StartServer, connect: Connect) -> None:
    server = small_server(offer=OFFER)
    session = connect(server.url)
    assert not session.up
    session.refresh().result()
    assert session.up
    assert session.server is not None
    assert session.server.blend is not None
    assert session.server.blend.separator == OFFER["separator"]
    server.stop()
    session.refresh().result()
    assert "Nothing answers" in session.problem
    assert session.server is not None, "what it was stays known"


def test_a_server_that_outlives_its_engine_is_down(small_server: StartServer, connect: Connect) -> None:
    server = small_server(health=(503, {"error": "the engine is dead"}))
    session = connect(server.url)
    session.refresh().result()
    assert session.problem == "Contender: HTTP 503: the engine is dead"
    server.health = (404, {})
    session.refresh().result()
    assert session.up, "another kind of server needn't have the path"


def test_refused_connection_names_the_address(connect: Connect) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert f"Nothing answers at {url}" in failure(answer(connect(url)))


def test_error_object_of_the_server_is_shown(small_server: StartServer, connect: Connect) -> None:
    server = small_server(error=(400, "ratio must be a number from 0 to 1, not 7"))
    message = failure(answer(connect(server.url)))
    assert "HTTP 400" in message
    assert "ratio must be a number from 0 to 1, not 7" in message


def test_error_in_the_stream_keeps_the_text_before_it(small_server: StartServer, connect: Connect) -> None:
    events = answer(connect(small_server(stream_error="out of memory").url))
    assert "out of memory" in failure(events)
    assert text_of(events) == "Hello, world"


def test_cut_stream_keeps_the_text_before_the_cut(small_server: StartServer, connect: Connect) -> None:
    events = answer(connect(small_server(cut_after=2).url))
    assert text_of(events) == "Hello, "
    assert "broke off" in failure(events)


def test_silent_server_is_given_up(small_server: StartServer, connect: Connect) -> None:
    session = connect(small_server(silence_s=30.0).url, timeout_s=0.2)
    assert "said nothing for 0.2 s" in failure(answer(session))


def test_answer_without_text_is_done_and_empty(small_server: StartServer, connect: Connect) -> None:
    events = answer(connect(small_server(pieces=[]).url))
    assert isinstance(events[0], FirstToken), "the end of the answer is a token too"
    assert isinstance(events[-1], Done)
    assert text_of(events) == ""


def test_page_that_is_no_openai_server_is_explained(small_server: StartServer, connect: Connect) -> None:
    server = small_server()
    assert "Not Found" in failure(answer(connect(server.url + "/elsewhere")))


def test_cancelling_closes_the_connection_at_once(small_server: StartServer, connect: Connect) -> None:
    server: SmallServer = small_server(pieces=["word "] * 50, hold_after=10)
    events: list[Event] = []
    future = connect(server.url).answer(QUESTION, Sampling(), events.append, "question-1")
    wait_until(lambda: len(events) >= 10)
    future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    wait_until(lambda: server.num_broken_streams == 1)
    num_events = len(events)
    time.sleep(0.1)
    assert len(events) == num_events
    assert not any(isinstance(event, Done | Failed) for event in events)


def test_one_client_serves_many_answers(small_server: StartServer, connect: Connect) -> None:
    session = connect(small_server().url)
    assert [text_of(answer(session)) for _ in range(3)] == ["Hello, world"] * 3


def test_tokens_are_counted_by_the_server(small_server: StartServer, connect: Connect) -> None:
    server = small_server()
    session = connect(server.url)
    assert len(session.prompt_ids(QUESTION)) == 5
    assert session.text_ids("keeps keeps") == [server.words["keeps"]] * 2
    server.stop()
    with pytest.raises(ContenderError):
        session.text_ids("bees")


# -- what a contender says of itself -----------------------------------------------------------------------------------


BLEND = {"contender": "blend", "policies": ["none"], "defaults": {"policy": "none", "ratio": 0.1}, "separator": "|"}


@pytest.mark.parametrize(
    ("offer", "report", "blends", "keeps_reports"),
    [
        (None, "", False, False),
        (None, "blend", False, False),
        (BLEND, "blend", True, True),
        ({"contender": "prefix", "defaults": {}}, "", False, True),
    ],
)
def test_what_a_server_is(offer: dict[str, Any] | None, report: str, blends: bool, keeps_reports: bool) -> None:
    server = Server.read(ServerInfo("town", max_model_len=4096, offer=offer), report)
    assert (server.model, server.max_model_len) == ("town", 4096)
    assert (server.blend is not None, server.keeps_reports) == (blends, keeps_reports)
    body = completion_request(server, [], Sampling(recomputing={"policy": "none", "ratio": 0.5}, mode="top_layer"))
    assert ("kv_transfer_params" in body) == blends


def test_each_kind_of_contender_gets_its_own_choices() -> None:
    chosen = Sampling(recomputing={"policy": "none", "ratio": 0.5}, mode="top_layer", similarity_threshold=0.9)
    blend = Server.read(ServerInfo("town", offer=BLEND), "blend")
    simllm = Server.read(ServerInfo("town", offer=SIMLLM_OFFER), "similar_task")
    assert simllm.simllm is not None
    assert (simllm.simllm.mode, simllm.simllm.similarity_threshold) == ("aligned", 0.998)
    assert completion_request(blend, [], chosen)["kv_transfer_params"]["kvarena"] == {"policy": "none", "ratio": 0.5}
    to_simllm = completion_request(simllm, [], chosen)["kv_transfer_params"]["kvarena"]
    assert to_simllm == {"mode": "top_layer", "similarity_threshold": 0.9}
    assert "kv_transfer_params" not in completion_request(simllm, [], Sampling())
