"""One tiny Llama for all tests of inter-task KV reuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))
