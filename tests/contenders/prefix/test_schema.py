"""Schemathesis on the prefix contender with a real model: nothing that its document allows or forbids breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from schemathesis import GenerationMode

from kvarena.contenders.prefix.http import router
from support.prefix_engine import make_prefix
from support.schema_cases import POSITIVE, both, check_operation, document_of

pytestmark = pytest.mark.slow

CASES = [
    *both("/generate", "/v1/completions"),
    ("/cache/stats", "GET", POSITIVE),
    ("/cache/clear", "POST", POSITIVE),
]


@pytest.fixture(scope="module")
def document(model_folders: dict[str, Path]) -> Any:
    return document_of(make_prefix(model_folders["llama"], max_model_len=48).engine, router)


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_nothing_breaks_the_server(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    check_operation(document, path, method, mode)
