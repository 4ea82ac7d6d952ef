"""Tiny random models of several families, each behind a prefix engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.prefix_engine import Prefix, make_prefix
from support.tiny_models import FAMILIES, save_model_folders


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_model_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session", params=[*FAMILIES, "town"])
def any_prefix(request: pytest.FixtureRequest, model_folders: dict[str, Path]) -> Iterator[Prefix]:
    prefix = make_prefix(model_folders[request.param], min_tokens=4)
    yield prefix
    prefix.engine.close()


@pytest.fixture
def prefix(model_folders: dict[str, Path]) -> Iterator[Prefix]:
    prefix = make_prefix(model_folders["llama"])
    yield prefix
    prefix.engine.close()
