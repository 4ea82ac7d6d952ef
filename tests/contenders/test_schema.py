"""Schemathesis on our own contenders with real models: nothing that a document allows or forbids breaks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import APIRouter
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from ai100.runtimes.runtime import StaticShapes
from ai100.server import router as ai100_router
from kvarena.contenders.prefix.http import router as prefix_router
from kvarena.contenders.simllm.engine import SimLLMEngine
from kvarena.contenders.simllm.http import router as simllm_router
from kvarena.contenders.simllm.inference import load_simllm
from kvarena.engines.base import Engine
from kvarena.server.app import create_app
from kvarena.server.state import ApiConfig
from kvarena.simllm import SimLLMParams
from support.ai100_engine import make_ai100
from support.prefix_engine import make_prefix
from support.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

TIMEOUT_S = 60
POSITIVE = GenerationMode.POSITIVE


def similar_to_all(mode: str) -> Callable[[Path], Engine]:
    """A Sim-LLM engine whose earlier prompts are all similar to each new one."""
    params = SimLLMParams(mode, max_cache_size=3, similarity_threshold=-1)
    return lambda folder: SimLLMEngine(load_simllm(str(folder), params, device="cpu", max_model_len=48), "tiny")


ENGINES: dict[str, tuple[Callable[[Path], Engine], APIRouter]] = {
    "prefix": (lambda folder: make_prefix(folder, max_model_len=48).engine, prefix_router),
    "simllm-aligned": (similar_to_all("aligned"), simllm_router),
    "simllm-top_layer": (similar_to_all("top_layer"), simllm_router),
    "ai100": (lambda folder: make_ai100(folder, StaticShapes(16, 96, 2, 2)).engine, ai100_router),
}


def cases_of(name: str, *paths: str, also: list[tuple[str, str]]) -> list[tuple[str, str, str, GenerationMode]]:
    """Bodies that the document allows, and such that it forbids; of the others those that it allows."""
    both = [(name, path, "POST", mode) for path in paths for mode in (POSITIVE, GenerationMode.NEGATIVE)]
    return [*both, *((name, path, method, POSITIVE) for path, method in also)]


SIMLLM = ("/v1/chat/completions", "/v1/completions")
TASKS = [("/tasks/stats", "GET"), ("/tasks/clear", "POST")]
CASES = [
    *cases_of("prefix", "/generate", "/v1/completions", also=[("/cache/stats", "GET"), ("/cache/clear", "POST")]),
    *cases_of("simllm-aligned", *SIMLLM, also=TASKS),
    *cases_of("simllm-top_layer", *SIMLLM, also=TASKS),
    *cases_of("ai100", "/v1/chat/completions", "/topic", also=[("/v1/completions", "POST"), ("/slots", "GET")]),
]


@pytest.fixture(scope="module")
def document_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "llama")
    with ExitStack() as stack:

        @cache
        def document_of(name: str) -> Any:
            make, router = ENGINES[name]
            engine = make(folder)
            stack.callback(engine.close)
            app = create_app(engine, ApiConfig(max_choices=8), routers=[router])
            return schemathesis.openapi.from_asgi("/openapi.json", app)

        yield document_of


@pytest.mark.parametrize(("name", "path", "method", "mode"), CASES)
def test_nothing_breaks_the_server(
    document_of: Callable[[str], Any], name: str, path: str, method: str, mode: GenerationMode
) -> None:
    """A body that the document allows may still be refused: the context's length and the vocabulary aren't in it. One
    that it forbids may still be taken, as vLLM takes `"16"`.
    """
    operation = document_of(name)[path][method]

    @given(data=st.data())
    @settings(
        max_examples=25,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def run(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        case.call_and_validate(timeout=TIMEOUT_S, excluded_checks=[positive_data_acceptance, negative_data_rejection])

    run()
