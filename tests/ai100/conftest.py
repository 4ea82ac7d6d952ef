"""A tiny random Llama behind an AI 100 engine, and beside it as Hugging Face serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.ai100_engine import AI100, make_ai100
from support.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def ai100_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("ai100") / "llama")


@pytest.fixture(scope="session")
def reference(ai100_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(ai100_folder, dtype=torch.float32).eval()


@pytest.fixture
def make(ai100_folder: Path, reference: Any) -> Iterator[Callable[..., AI100]]:
    made: list[AI100] = []

    def make_one(**settings: Any) -> AI100:
        made.append(make_ai100(ai100_folder, reference=reference, **settings))
        return made[-1]

    yield make_one
    for ai100 in made:
        ai100.engine.close()


@pytest.fixture
def ai100(make: Callable[..., AI100]) -> AI100:
    return make()
