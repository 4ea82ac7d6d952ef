"""Faults of a stack without vLLM: a small PyTorch server in place of `plain`, and a real LMCache server beside it."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import random
from collections.abc import Iterator

import pytest
from rich.console import Console

from kvarena.bench.soak import faults
from kvarena.bench.soak.campaign import Soak, SoakServer, Stack
from kvarena.contenders.spec import LMCACHE_SERVER
from kvarena.documents import Documents, TextChunk
from kvarena.home import Home
from kvarena.stack import lifecycle
from kvarena.stack.plan import make_plan
from kvarena.stack.record import Record
from kvarena.stack.services import build_services
from kvarena.stack.settings import load_settings
from kvarena.stack.supervisord import running_supervisor
from support.running_stack import free_port_base
from support.tiny_models import random_text, save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KINDS = ("kill-server", "kill", "freeze", "restart", "clear")
RNG = random.Random(1)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model, home = save_tiny_model(tmp_path_factory.mktemp("model")), Home(tmp_path_factory.mktemp("home"))
    settings = load_settings(
        contenders=("blend", "prefix"), model=str(model), port_base=free_port_base(), ui=False, lmcache_l2="none"
    )
    plan = dataclasses.replace(make_plan(settings, home), lmcache_gb=0.25)
    services = {service.name: service for service in build_services(plan, home)}
    plain = dataclasses.replace(services["prefix"], name="plain", log_path=str(home.log("plain")), cpus=())
    record = Record((services[LMCACHE_SERVER], plain), "", str(plan.data_dir), plan.model.served_name)
    console = Console(file=io.StringIO())
    try:
        lifecycle.bring_up(record, home, console, check=lambda missing: None, secrets={})
        started, runner = running_supervisor(home)
        assert started
        assert runner
        yield Stack(home, started, runner)
    finally:
        lifecycle.down(home, console)


def test_everything_comes_back(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PAUSE_S", (1.0, 3.0))
    documents = Documents(tuple(TextChunk(f"text {i}", random_text(RNG, 30)) for i in range(8)))
    (address,) = (service.address for service in stack.record.services if service.name == "plain")
    run = Soak([SoakServer("plain", address)], documents, stack, KINDS, seconds=45.0, num_streams=6, num_prompts=14)
    outcome = asyncio.run(run.run(lambda: None))
    assert outcome.findings == []
    assert outcome.failed == []
    assert len(outcome.struck) > 2
    assert "kill-server" in [struck.kind for struck in outcome.struck]
    (row,) = outcome.rows
    assert row["num_down"] > 0, "requests to a server that was killed"
    assert row["num_equal"] > 0
    names = {(check.what, check.of) for check in outcome.checks}
    assert {("read_locked_count", LMCACHE_SERVER), ("descriptors", "plain"), ("threads", LMCACHE_SERVER)} <= names
