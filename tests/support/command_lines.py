"""What a service's program makes of its command line, by the program's own parser."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from kvarena.contenders.servers import EngineServer
from kvarena.contenders.spec import ContenderSpec, contender_specs
from kvarena.stack.service import Service

VLLM = "vllm.entrypoints.openai.api_server"
LMCACHE = "lmcache.cli.main"
PAGE = "streamlit"
ENGINES = [spec for spec in contender_specs().values() if isinstance(spec.server, EngineServer)]


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
