"""The middleware checks our parameters on every path that generates, and hands on what is vLLM's to refuse."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from vllm.config import ModelConfig
from vllm.entrypoints.launchers.api_server.routers import register_api_routers

from kvarena.engines.vllm.config import MAX_NAMED_CHUNKS, BlendConfig
from kvarena.engines.vllm.middleware import (
    MAX_BYTES_PER_TOKEN,
    MAX_CONTEXTS,
    MAX_FULL_SEQUENCES,
    KVArenaMiddleware,
)
from kvarena.policies.params import PARAMETERS
from kvarena.policies.registry import REQUEST_KEYS
from support.tiny_models import save_tiny_model, tiny_tokenizer

PATHS = [
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/cohere/v2/chat",
    "/inference/v1/generate",
    "/invocations",
]
"""All of vLLM's that generate and take `kv_transfer_params`."""
WITHOUT_PARAMETERS = ["/v1/systemone", "/generative_scoring"]
NOT_GENERATING = (
    "/render",
    "/derender",
    "/count_tokens",
    "/cancel",
    "tokenize",
    "_lora_adapter",
    "/abort_requests",
    "elastic_ep",
    "/ping",
)
MAX_MODEL_LEN = 64


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"got": (await request.body()).decode()})


class NothingStored:
    """An engine whose workers know of no chunk."""

    async def collective_rpc(self, _name: str, args: tuple[Any, ...]) -> list[list[str]]:
        return [["not_stored"] * len(args[0])]


def client_of(model: str, root_path: str = "") -> TestClient:
    """Before an application that tells what it got."""
    app = FastAPI(root_path=root_path)
    for path in PATHS + WITHOUT_PARAMETERS:
        app.add_api_route(path, echo, methods=["POST"])
    app.state.vllm_config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=BlendConfig().to_extra_config()),
        model_config=ModelConfig(model, max_model_len=MAX_MODEL_LEN),
    )
    app.state.engine_client = NothingStored()
    app.add_middleware(KVArenaMiddleware)
    return TestClient(app)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def client(model: str) -> TestClient:
    return client_of(model)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "nonsense"}, "policy must be one of"),
        ({"ratio": 7}, "ratio must be a number from 0 to 1"),
        ({"check_layer": 4}, "check_layer must be from 0 to 3"),
        ({"colour": "red"}, "has no 'colour'"),
        ({"max_ttft_ms": 10**400}, "a number above 0 and at most 86400000"),
        ({"max_ttft_ms": -1}, "a number above 0"),
        ({"chunks": "text"}, "chunks must be a list"),
        ({"chunks": [[1, True]]}, "chunks must be a list"),
        ({"chunks": [[-1]]}, "chunks must be a list"),
        ({"chunks": ["a"] * (MAX_NAMED_CHUNKS + 1)}, "chunks must be at most 4096, not 4097"),
    ],
)
def test_bad_parameters_are_refused(client: TestClient, path: str, given: dict[str, object], message: str) -> None:
    reply = client.post(path, json={"kv_transfer_params": {"kvarena": given}})
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_a_bad_budget_of_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step_tokens must not be negative, not -1"):
        BlendConfig(step_tokens=-1)


def test_they_are_refused_behind_a_proxys_path_too(model: str) -> None:
    reply = client_of(model, "/llm").post("/llm/v1/completions", json={"kv_transfer_params": {"kvarena": {"ratio": 7}}})
    assert reply.status_code == 400


def test_what_a_path_would_ignore_is_refused(client: TestClient) -> None:
    hidden = {"sampling_params": {"extra_args": {"kv_transfer_params": {"kvarena": {"ratio": 7}}}}}
    bodies = [("/cohere/v2/chat", {"cache_salt": "mine"}), ("/inference/v1/generate", hidden)]
    bodies += [(path, {"kv_transfer_params": {"kvarena": {"ratio": 0}}}) for path in WITHOUT_PARAMETERS]
    for path, body in bodies:
        assert client.post(path, json=body).status_code == 400, path


def test_every_path_of_vllm_that_generates_is_known(client: TestClient) -> None:
    """A new one has to be looked at: does it take salts and parameters, and under which id does it answer?"""
    app = FastAPI()
    app.state.args = SimpleNamespace(enable_scale_out=True, tokens_only=False)
    register_api_routers(app.state.args, app, ("generate",))
    paths = {route.path for route in app.routes if isinstance(route, APIRoute) and "POST" in route.methods}
    assert {path for path in paths if not path.endswith(NOT_GENERATING)} <= {*PATHS, *WITHOUT_PARAMETERS}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", ["no JSON", "[" * 100_000, '{"a":' * 5000, "null", ""])
def test_what_is_no_json_object_is_handed_on_as_it_came(client: TestClient, path: str, body: str) -> None:
    reply = client.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.json() == {"got": body}


def encoded_chunks(client: TestClient, body: dict[str, Any]) -> Any:
    reply = client.post(PATHS[0], content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == 200, reply.text
    return json.loads(reply.json()["got"]).get("kv_transfer_params", {}).get("kvarena", {}).get("chunks")


def test_chunks_and_message_parts_become_token_ids_before_the_scheduler(client: TestClient) -> None:
    texts = ["old cat # # tea", "seven goats"]
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    parts = [{"type": "text", "text": text} for text in texts]
    assert encoded_chunks(client, {"kv_transfer_params": {"kvarena": {"chunks": [texts[0], ids[1]]}}}) == ids
    assert encoded_chunks(client, {"messages": [{"role": "user", "content": parts}]}) == ids
    assert encoded_chunks(client, {"messages": [[{"role": "user", "content": parts}]]}) == ids
    assert encoded_chunks(client, {"messages": [{"role": "user", "content": parts[:1]}]}) is None


def test_more_than_any_prompt_could_have_is_refused_as_chunks_and_left_alone_as_parts(client: TestClient) -> None:
    most = MAX_CONTEXTS * MAX_MODEL_LEN
    for chunks in (["x" * (MAX_BYTES_PER_TOKEN * most + 1)], ["xq" * most], [[7] * (most + 1)]):
        reply = client.post(PATHS[0], json={"kv_transfer_params": {"kvarena": {"chunks": chunks}}})
        assert reply.status_code == 400
        assert "with this model's context at most" in reply.json()["error"]["message"]
    for texts in (["x" * 10_000] * 2, ["x"] * (MAX_NAMED_CHUNKS + 1), ["\ud800", "x"]):
        parts = [{"type": "text", "text": text} for text in texts]
        assert encoded_chunks(client, {"messages": [{"role": "user", "content": parts}]}) is None


@pytest.mark.parametrize(
    "several", [{"n": 8}, {"prompt": ["a"] * 8}, {"prompt": ["a", "b"], "n": 4}, {"messages": [[{"role": "user"}]] * 8}]
)
def test_chunks_count_for_each_answer_that_is_planned_with_them(client: TestClient, several: dict[str, Any]) -> None:
    chunks = [[7] * (MAX_FULL_SEQUENCES * MAX_CONTEXTS * MAX_MODEL_LEN // 8)]
    assert encoded_chunks(client, several | {"kv_transfer_params": {"kvarena": {"chunks": chunks}}}) == chunks
    chunks[0].append(7)
    reply = client.post(PATHS[0], json=several | {"kv_transfer_params": {"kvarena": {"chunks": chunks}}})
    assert reply.status_code == 400
    assert "for each of 8 answers" in reply.json()["error"]["message"]


@pytest.mark.parametrize("body", [{"prompt": "\ud800"}, {"prompt": "a", "cache_salt": "\ud800"}])
def test_halves_of_characters_are_refused_where_chunks_are_looked_up(client: TestClient, body: dict[str, str]) -> None:
    reply = client.post("/kvarena/chunks", content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert "surrogates not allowed" in reply.json()["error"]["message"]


@pytest.mark.parametrize("transfer", [[1], "kvarena", 7, {"kvarena": {"chunks": ["\ud800"]}}])
def test_what_is_no_parameters_is_vllms_to_refuse_and_no_failure(client: TestClient, transfer: object) -> None:
    parts = [{"type": "text", "text": "a"}] * 2
    body = json.dumps({"kv_transfer_params": transfer, "messages": [{"role": "user", "content": parts}]})
    reply = client.post(PATHS[0], content=body, headers={"content-type": "application/json"})
    assert reply.json() == {"got": body} if reply.status_code == 200 else reply.status_code == 400


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CHUNK_LISTS = st.lists(ANY_TEXT | st.lists(st.integers(-1, 2**40), max_size=4), max_size=4)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    path=st.sampled_from([*PATHS, *WITHOUT_PARAMETERS]),
    asked=st.dictionaries(st.sampled_from([*PARAMETERS, *REQUEST_KEYS, "other"]), ANYTHING, max_size=3),
    chunks=st.none() | CHUNK_LISTS,
    beside=st.dictionaries(
        st.sampled_from(["prompt", "messages", "n", "cache_salt", "sampling_params"]), ANYTHING, max_size=3
    ),
)
def test_any_parameters_are_taken_or_refused(
    client: TestClient, path: str, asked: dict[str, Any], chunks: list[Any] | None, beside: dict[str, Any]
) -> None:
    asked |= {} if chunks is None else {"chunks": chunks}
    body = json.dumps(beside | {"kv_transfer_params": {"kvarena": asked}})
    reply = client.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400), reply.text


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    asked=st.dictionaries(st.sampled_from(["prompt", "cache_salt", "chunks", "scores", "other"]), ANYTHING),
    prompt=st.none() | ANY_TEXT | st.lists(st.integers(-(2**70), 2**70), max_size=8),
    chunks=st.none() | CHUNK_LISTS,
)
def test_any_look_up_of_chunks_is_answered_or_refused(
    client: TestClient, asked: dict[str, Any], prompt: object, chunks: list[Any] | None
) -> None:
    asked |= {} if prompt is None else {"prompt": prompt}
    asked |= {} if chunks is None else {"chunks": chunks}
    reply = client.post("/kvarena/chunks", content=json.dumps(asked), headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400), reply.text


@pytest.mark.parametrize("depth", [300, 900, 960, 990])
def test_nesting_is_no_failure(client: TestClient, depth: int) -> None:
    parts = '[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]'
    body = f'{{"messages": [{{"role": "user", "content": {parts}}}, {"[" * depth}{"]" * depth}]}}'
    reply = client.post(PATHS[0], content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400)
