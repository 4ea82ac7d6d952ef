"""Tiny random models of several families."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tiny_models import save_model_folders


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_model_folders(tmp_path_factory.mktemp("models"))
