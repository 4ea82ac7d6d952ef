"""The page's modules are imported as Streamlit imports them: from their own folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from streamlit.components.v2 import manifest_scanner

from support.small_openai_server import SmallServer, started_servers

FRONTEND = Path(__file__).resolve().parents[2] / "frontend"
sys.path.insert(0, str(FRONTEND))
# For each page, Streamlit looks for components in all installed packages, which takes longer than most tests.
manifest_scanner.scan_component_manifests = cache(manifest_scanner.scan_component_manifests)


@pytest.fixture
def small_server() -> Iterator[Callable[..., SmallServer]]:
    with started_servers() as start:
        yield start


@pytest.fixture(autouse=True)
def patient_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy answers within two seconds, most of the time."""
    monkeypatch.setattr("chat_session.STATE_TIMEOUT_S", 30.0)
    monkeypatch.setattr("state.FORETELL_WAIT_S", 30.0)
