"""Homes, small services and free ports for the tests of the stack."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from kvarena.contenders.servers import COMMON_ENVIRONMENT
from kvarena.home import Home
from kvarena.stack import machine
from kvarena.stack.processes import processes_of, stop_leftovers
from kvarena.stack.service import Service
from support.lmcache_server import free_port

SMALL_SERVICE = Path(__file__).parents[1] / "support" / "small_service.py"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's own environment reaches a test."""
    from kvarena.stack.settings import Settings

    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("KVARENA_HOME", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: [(0,), (1,)])
    monkeypatch.setattr(machine, "has_compiler", lambda: True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home of its own, in which nothing is left running."""
    home = Home(tmp_path / "state folder; 100% #new")
    monkeypatch.setenv("KVARENA_HOME", str(home.path))
    yield home
    with contextlib.suppress(OSError):
        stop_leftovers(home)
    assert not processes_of(home)


@pytest.fixture
def console() -> Console:
    """A terminal that is none; `console.file.getvalue()` is what was printed."""
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def small_service(home: Home) -> Callable[..., Service]:
    """Makes a service out of `small_service.py` with these options."""

    def make(
        name: str, *options: str, depends_on: tuple[str, ...] = (), start_timeout_s: float = 20.0, port: int = 0
    ) -> Service:
        port = port or free_port()
        return Service(
            name=name,
            title=f"small {name}",
            command=(sys.executable, str(SMALL_SERVICE), str(port), *options),
            port=port,
            address=f"http://127.0.0.1:{port}",
            health_url=f"http://127.0.0.1:{port}/health",
            log_path=str(home.log(name)),
            environment={**COMMON_ENVIRONMENT, "QUOTES": "a \"b\" 'c' 100% # d ; e\nf"},
            directory=str(home.path),
            depends_on=depends_on,
            start_timeout_s=start_timeout_s,
            stop_timeout_s=3.0,
        )

    return make
