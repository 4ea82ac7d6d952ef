"""Schemathesis on the prefix contender with a real model: nothing that its document allows or forbids breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from schemathesis import GenerationMode

from kvarena.contenders.prefix.http import router
from kvarena.server.app import create_app
from kvarena.server.state import ApiConfig
from support.prefix_engine import make_prefix
from support.schema_cases import NEGATIVE, POSITIVE, check_operation

pytestmark = pytest.mark.slow

FEW = ApiConfig(max_choices=8)

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
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, FEW, routers=[router]))


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_nothing_breaks_the_server(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    check_operation(document, path, method, mode)
