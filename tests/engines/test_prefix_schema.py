"""Schemathesis on the prefix contender with a real model: nothing that its document allows or forbids breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from kvarena.api.app import create_app
from kvarena.engines.prefix.http import router
from prefix_engine import make_prefix

pytestmark = pytest.mark.slow

POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [
    ("/generate", "POST", POSITIVE),
    ("/generate", "POST", NEGATIVE),
    ("/v1/completions", "POST", POSITIVE),
    ("/v1/completions", "POST", NEGATIVE),
    ("/cache/stats", "GET", POSITIVE),
    ("/cache/clear", "POST", POSITIVE),
]


@pytest.fixture(scope="module")
def document(model_folders: dict[str, Path]) -> Any:
    engine = make_prefix(model_folders["llama"], max_model_len=48).engine
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, routers=[router]))


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_nothing_breaks_the_server(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    """A body that the document allows may still be refused: the context's length and the vocabulary aren't in it."""
    operation = document[path][method]

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
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    run()
