"""Schemathesis on the Sim-LLM contender with a real model, whose earlier prompts are all similar to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from schemathesis import GenerationMode

from kvarena.contenders.simllm.engine import SimLLMEngine
from kvarena.contenders.simllm.http import router
from kvarena.contenders.simllm.inference import load_simllm
from kvarena.simllm import SimLLMParams
from support.schema_cases import POSITIVE, both, check_operation, document_of

pytestmark = pytest.mark.slow

CASES = [
    *both("/v1/chat/completions", "/v1/completions"),
    ("/tasks/stats", "GET", POSITIVE),
    ("/tasks/clear", "POST", POSITIVE),
]


@pytest.fixture(scope="module", params=["aligned", "top_layer"])
def document(request: pytest.FixtureRequest, folder: Path) -> Any:
    params = SimLLMParams(request.param, max_cache_size=3, similarity_threshold=-1)
    engine = SimLLMEngine(load_simllm(str(folder), params, device="cpu", max_model_len=48), "tiny")
    return document_of(engine, router)


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_nothing_breaks_the_server(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    check_operation(document, path, method, mode)
