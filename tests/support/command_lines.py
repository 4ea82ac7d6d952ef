"""What settings come to: the services, and what each one's program makes of its command line, by its own parser."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from kvarena.contenders.servers import EngineServer
from kvarena.contenders.spec import ContenderSpec, contender_specs
from kvarena.home import Home
from kvarena.stack import machine
from kvarena.stack.plan import Plan, make_plan
from kvarena.stack.service import Service
from kvarena.stack.services import build_services
from kvarena.stack.settings import load_settings

VLLM = "vllm.entrypoints.openai.api_server"
LMCACHE = "lmcache.cli.main"
PAGE = "streamlit"
ENGINES = [spec for spec in contender_specs().values() if isinstance(spec.server, EngineServer)]


def make(home: Home, tmp_path: Path, **command_line: object) -> tuple[Plan, dict[str, Service]]:
    made = make_plan(load_settings(tmp_path / ".env", **({"profile": "cpu"} | command_line)), home)
    return made, {service.name: service for service in build_services(made, home)}


def with_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: str) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: list(gpus))
    monkeypatch.setattr(machine, "installed_vllm", lambda: "gpu")


def parsed(service: Service) -> dict[str, Any]:
    """Values by the names of the program's options, its defaults included. A wrong option or value raises."""
    _python, flag, module, *words = service.command
    assert flag == "-m"
    if module == VLLM:
        return vars(_vllm_parser().parse_args(words))
    if module == LMCACHE:
        return vars(_lmcache_parser().parse_args(words[1:]))
    if module == PAGE:
        return _page_options(words[1:])
    return _engine_options(module, words)


def extra_config(service: Service) -> dict[str, object]:
    extra: dict[str, object] = parsed(service)["kv_transfer_config"].kv_connector_extra_config
    return extra


def listens_on(service: Service) -> set[str]:
    options = parsed(service)
    return {options[name] for name in ("host", "http_host", "server_address") if name in options}


@cache
def _vllm_parser() -> argparse.ArgumentParser:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: argparse.ArgumentParser = make_arg_parser(FlexibleArgumentParser())
    return parser


@cache
def _lmcache_parser() -> argparse.ArgumentParser:
    from lmcache.cli.commands.server import ServerCommand

    parser = argparse.ArgumentParser()
    ServerCommand().add_arguments(parser)
    return parser


def shared_memory(options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """What an LMCache server with these options shares with its clients, on a machine that can pin memory; empty where
    it shares none, and pickles what they ask for.
    """
    from lmcache.v1.distributed import config
    from lmcache.v1.multiprocess.engine_context import MPCacheServerContext

    monkeypatch.setattr(config, "current_device_spec", SimpleNamespace(is_pin_supported=True))
    storage = config.parse_args_to_config(argparse.Namespace(**options))
    return str(MPCacheServerContext._compute_shm_pool_info(storage)["shm_name"])


def _page_options(words: Sequence[str]) -> dict[str, Any]:
    from streamlit.web.cli import main_run

    return dict(main_run.make_context("run", list(words)).params)


def _engine_options(module: str, words: Sequence[str]) -> dict[str, Any]:
    (spec,) = (spec for spec in ENGINES if isinstance(spec.server, EngineServer) and spec.server.module == module)
    return dict(command_of(spec).make_context(spec.name, list(words)).params)


def command_of(spec: ContenderSpec) -> Any:
    """What its module runs when it is started."""
    assert isinstance(spec.server, EngineServer)
    module = importlib.import_module(spec.server.module)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{spec.server.module}.__main__")
    app = typer.Typer()
    app.command()(module.main)
    return typer.main.get_command(app)
