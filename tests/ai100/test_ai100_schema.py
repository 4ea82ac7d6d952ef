"""Schemathesis on the AI 100 contender with a real model: nothing that its document allows or forbids breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from schemathesis import GenerationMode

from ai100.runtimes.runtime import StaticShapes
from ai100.server import router
from support.ai100_engine import make_ai100
from support.schema_cases import POSITIVE, both, check_operation, document_of

pytestmark = pytest.mark.slow

CASES = [*both("/v1/chat/completions", "/topic"), ("/v1/completions", "POST", POSITIVE), ("/slots", "GET", POSITIVE)]


@pytest.fixture(scope="module")
def document(ai100_folder: Path) -> Any:
    engine = make_ai100(ai100_folder, StaticShapes(16, 96, 2, 2)).engine
    yield document_of(engine, router)
    engine.close()


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_nothing_breaks_the_server(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    check_operation(document, path, method, mode)
