"""Schemathesis on the AI 100 contender with a real model: nothing that its document allows or forbids breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ai100.runtimes.runtime import StaticShapes
from ai100.server import router
from ai100_engine import make_ai100
from kvarena.api.app import create_app

pytestmark = pytest.mark.slow

POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [
    ("/v1/chat/completions", "POST", POSITIVE),
    ("/v1/chat/completions", "POST", NEGATIVE),
    ("/v1/completions", "POST", POSITIVE),
    ("/slots", "GET", POSITIVE),
]


@pytest.fixture(scope="module")
def document(ai100_folder: Path) -> Any:
    engine = make_ai100(ai100_folder, StaticShapes(16, 96, 2, 2)).engine
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, routers=[router]))
    engine.close()


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
