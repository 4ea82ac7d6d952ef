"""Schemathesis on one path of a server: nothing that its document allows or forbids breaks it."""

from __future__ import annotations

from typing import Any

import schemathesis
from fastapi import APIRouter
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from kvarena.engines.base import Engine
from kvarena.server.app import create_app
from kvarena.server.state import ApiConfig

TIMEOUT_S = 60
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
Case = tuple[str, str, GenerationMode]


def both(*paths: str) -> list[Case]:
    """Bodies that the document allows, and such that it forbids."""
    return [(path, "POST", mode) for path in paths for mode in (POSITIVE, NEGATIVE)]


def document_of(engine: Engine, router: APIRouter) -> Any:
    app = create_app(engine, ApiConfig(max_choices=8), routers=[router])
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def check_operation(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    """A body that the document allows may still be refused: the context's length and the vocabulary aren't in it. One
    that it forbids may still be taken, as vLLM takes `"16"`.
    """
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
        case.call_and_validate(timeout=TIMEOUT_S, excluded_checks=[positive_data_acceptance, negative_data_rejection])

    run()
