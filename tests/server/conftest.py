"""One server for the tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from support.real_server import RealServer, serving
from support.scripted_engine import ScriptedEngine


@pytest.fixture(scope="package")
def real() -> Iterator[RealServer[ScriptedEngine]]:
    with serving(ScriptedEngine()) as server:
        yield server


@pytest.fixture(scope="package")
def http(real: RealServer[ScriptedEngine]) -> Iterator[httpx.Client]:
    with real.client() as client:
        yield client
