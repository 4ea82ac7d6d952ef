"""The page's modules are imported as Streamlit imports them: from their own folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.small_openai_server import SmallServer

FRONTEND = Path(__file__).resolve().parents[2] / "frontend"
sys.path.insert(0, str(FRONTEND))


@pytest.fixture
def small_server() -> Iterator[Callable[..., SmallServer]]:
    """Starts servers; they are stopped after the test."""
    servers: list[SmallServer] = []

    def start(**behaviour: Any) -> SmallServer:
        servers.append(SmallServer(**behaviour))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def patient_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy answers within two seconds, most of the time."""
    monkeypatch.setattr("chat_session.STATE_TIMEOUT_S", 30.0)
    monkeypatch.setattr("slots_view.FORETELL_WAIT_S", 30.0)
