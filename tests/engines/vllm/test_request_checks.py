"""The middleware checks our parameters on every path that generates, and hands on what is vLLM's to refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from kvarena.engines.vllm.config import BlendConfig
from kvarena.engines.vllm.middleware import KVArenaMiddleware

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"got": (await request.body()).decode()})


@pytest.fixture
def client() -> TestClient:
    app = Starlette(routes=[Route(path, echo, methods=["POST"]) for path in PATHS])
    app.state.vllm_config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=BlendConfig().to_extra_config()),
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=4)),
    )
    app.add_middleware(KVArenaMiddleware)
    return TestClient(app)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "nonsense"}, "policy must be one of"),
        ({"ratio": 7}, "ratio must be a number from 0 to 1"),
        ({"check_layer": 4}, "check_layer must be from 0 to 3"),
        ({"colour": "red"}, "has no 'colour'"),
    ],
)
def test_bad_parameters_are_refused(client: TestClient, path: str, given: dict[str, object], message: str) -> None:
    reply = client.post(path, json={"kv_transfer_params": {"kvarena": given}})
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", ["no JSON", "[" * 100_000, '{"a":' * 5000, "null", ""])
def test_what_is_no_json_object_is_handed_on_as_it_came(client: TestClient, path: str, body: str) -> None:
    assert client.post(path, content=body).json() == {"got": body}
