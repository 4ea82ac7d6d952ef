"""vLLM's and LMCache's own parsers take every flag that the stack gives them, for every contender and profile."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kvarena.contenders.spec import LMCACHE_SERVER, contender_specs
from kvarena.home import Home
from kvarena.stack import machine
from kvarena.stack.plan import make_plan
from kvarena.stack.service import Service
from kvarena.stack.services import build_services
from kvarena.stack.settings import load_settings
from support.command_lines import parsed

pytestmark = pytest.mark.slow

VLLM_CONTENDERS = [name for name, spec in contender_specs().items() if spec.is_vllm]


def services(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> dict[str, Service]:
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0", "1"])
    chosen = {"contenders": ",".join(VLLM_CONTENDERS), "blend_deviation": "keys", **settings}
    plan = make_plan(load_settings(tmp_path / ".env", **chosen), home)
    return {service.name: service for service in build_services(plan, home)}


@pytest.mark.parametrize(
    "settings",
    [
        {"profile": "cpu", "max_model_len": 512, "load_format": "dummy", "dtype": "float32"},
        {"profile": "gpu"},
        {"profile": "gpu", "kv_cache_gb": 8, "blend_engine": "lmcache", "model": "org/model"},
    ],
    ids=["cpu", "gpu", "LMCache's own blender"],
)
def test_vllm_takes_its_command_lines(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    built = services(home, tmp_path, monkeypatch, **settings)
    for name in VLLM_CONTENDERS:
        options = parsed(built[name])
        validate_parsed_serve_args(argparse.Namespace(**options))
        assert options["port"] == built[name].port
        transfer = options["kv_transfer_config"]
        assert (transfer is None) == (name == "plain")
        if name == "blend":
            expected = "LMCacheConnectorV1" if "blend_engine" in settings else "KVArenaConnector"
            assert transfer.kv_connector == expected
            assert options["enable_prefix_caching"] == ("blend_engine" not in settings)


def test_lmcache_takes_its_command_line(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = services(home, tmp_path, monkeypatch, profile="cpu")[LMCACHE_SERVER]
    options = parsed(server)
    assert (options["port"], options["http_port"]) == (server.port, server.other_ports[0])
    assert options["chunk_size"] == 32
