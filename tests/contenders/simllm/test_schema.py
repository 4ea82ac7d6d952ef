"""Schemathesis on the Sim-LLM contender with a real model, whose earlier prompts are all similar to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from schemathesis import GenerationMode

from kvarena.contenders.simllm.engine import SimLLMEngine
from kvarena.contenders.simllm.http import router
from kvarena.contenders.simllm.inference import load_simllm
from kvarena.server.app import create_app
from kvarena.server.state import ApiConfig
from kvarena.simllm import SimLLMParams
from support.schema_cases import NEGATIVE, POSITIVE, check_operation

pytestmark = pytest.mark.slow

FEW = ApiConfig(max_choices=8)

CASES = [
    ("/v1/chat/completions", "POST", POSITIVE),
    ("/v1/chat/completions", "POST", NEGATIVE),
    ("/v1/completions", "POST", POSITIVE),
    ("/v1/completions", "POST", NEGATIVE),
    ("/tasks/stats", "GET", POSITIVE),
    ("/tasks/clear", "POST", POSITIVE),
]


@pytest.fixture(scope="module", params=["aligned", "top_layer"])
def document(request: pytest.FixtureRequest, folder: Path) -> Any:
    params = SimLLMParams(request.param, max_cache_size=3, similarity_threshold=-1)
    engine = SimLLMEngine(load_simllm(str(folder), params, device="cpu", max_model_len=48), "tiny")
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, FEW, routers=[router]))


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_nothing_breaks_the_server(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    check_operation(document, path, method, mode)
