"""What settings come to, for tests of the services."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvarena.home import Home
from kvarena.stack import machine
from kvarena.stack.plan import Plan, make_plan
from kvarena.stack.service import Service
from kvarena.stack.services import build_services
from kvarena.stack.settings import load_settings
from support.command_lines import parsed


def make(home: Home, tmp_path: Path, **command_line: object) -> tuple[Plan, dict[str, Service]]:
    made = make_plan(load_settings(tmp_path / ".env", **({"profile": "cpu"} | command_line)), home)
    return made, {service.name: service for service in build_services(made, home)}


def extra_config(service: Service) -> dict[str, object]:
    extra: dict[str, object] = parsed(service)["kv_transfer_config"].kv_connector_extra_config
    return extra


def with_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: str) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: list(gpus))
    monkeypatch.setattr(machine, "installed_vllm", lambda: "gpu")
