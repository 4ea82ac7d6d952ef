"""The command lines of the servers over `kvarena.server`, by their specs."""

from __future__ import annotations

import importlib
from typing import Any

import typer

from kvarena.contenders.servers import EngineServer
from kvarena.contenders.spec import ContenderSpec, contender_specs

ENGINES = [spec for spec in contender_specs().values() if isinstance(spec.server, EngineServer)]


def command_of(spec: ContenderSpec) -> Any:
    """What its module runs when it is started."""
    assert isinstance(spec.server, EngineServer)
    module = importlib.import_module(spec.server.module)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{spec.server.module}.__main__")
    app = typer.Typer()
    app.command()(module.main)
    return typer.main.get_command(app)
