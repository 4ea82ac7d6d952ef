"""deploy/production-stack.yaml: vLLM and LMCache take its flags, its objects fit together, and the chart takes it.

The chart isn't part of the project: PRODUCTION_STACK names its folder (`helm/` of vllm-project/production-stack). With
the program `helm` it is rendered as well.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from kvarena.contenders.lmcache import LMCACHE_CHUNK_TOKENS
from kvarena.engines.vllm.config import BlendConfig
from support.command_lines import shared_memory

VALUES_FILE = Path(__file__).parents[2] / "deploy" / "production-stack.yaml"
VALUES: dict[str, Any] = yaml.safe_load(VALUES_FILE.read_text())
ENGINE = VALUES["servingEngineSpec"]["modelSpec"][0]
HASH_SEED = {"name": "PYTHONHASHSEED", "value": "123"}
"""As the chart sets it for vLLM."""


def objects(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in VALUES["extraObjects"] if one["kind"] == kind}


def pods() -> dict[str, dict[str, Any]]:
    """Of our own objects: each pod's template, by its label `app`."""
    found = {**objects("DaemonSet"), **objects("Deployment")}
    return {name: one["spec"]["template"] for name, one in found.items()}


def lmcache_command() -> list[str]:
    command: list[str] = pods()["kvarena-lmcache"]["spec"]["containers"][0]["command"]
    return command


def extra_config() -> dict[str, Any]:
    arguments = ENGINE["vllmConfig"]["extraArgs"]
    extra: dict[str, Any] = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    return dict(extra["kv_connector_extra_config"])


@pytest.mark.slow
def test_vllm_takes_the_flags() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = ["--model", ENGINE["modelURL"], *ENGINE["vllmConfig"]["extraArgs"]]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(parsed)
    assert parsed.kv_transfer_config.kv_connector == "KVArenaConnector"


@pytest.mark.slow
def test_lmcache_takes_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache.cli.commands.server import ServerCommand
    from lmcache.v1.distributed.l2_adapters.resp_l2_adapter import RESPL2AdapterConfig

    parser = argparse.ArgumentParser()
    ServerCommand().add_arguments(parser)
    parsed = parser.parse_args(lmcache_command()[4:])
    (ports,) = (container["ports"] for container in pods()["kvarena-lmcache"]["spec"]["containers"])
    assert [parsed.port, parsed.http_port] == [port["containerPort"] for port in ports]
    assert parsed.chunk_size == LMCACHE_CHUNK_TOKENS
    assert shared_memory(vars(parsed), monkeypatch) == "lmcache_l1_pool_kvarena"
    second_tier = RESPL2AdapterConfig.from_dict(json.loads(lmcache_command()[-1]))
    service = objects("Service")[second_tier.host]
    assert second_tier.port == service["spec"]["ports"][0]["port"]


def test_the_blend_reaches_the_lmcache_of_its_node() -> None:
    config = BlendConfig.from_extra_config(extra_config())
    service = objects("Service")["kvarena-lmcache"]
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert config.lmcache_url == f"tcp://kvarena-lmcache:{ports['requests']}"
    assert config.lmcache_http_url == f"http://kvarena-lmcache:{ports['http']}"
    assert service["spec"]["internalTrafficPolicy"] == "Local"
    lmcache = pods()["kvarena-lmcache"]["spec"]
    assert lmcache["containers"][0]["image"] == f"{ENGINE['repository']}:{ENGINE['tag']}", "one user, one LMCache"
    assert HASH_SEED in lmcache["containers"][0]["env"]
    for volumes, mounts in (
        (ENGINE["extraVolumes"], ENGINE["extraVolumeMounts"]),
        (lmcache["volumes"], lmcache["containers"][0]["volumeMounts"]),
    ):
        assert volumes == [{"name": mounts[0]["name"], "hostPath": {"path": "/dev/shm", "type": "Directory"}}]
        assert mounts[0]["mountPath"] == "/dev/shm"


def test_selectors_and_ports_fit() -> None:
    for one in [*objects("DaemonSet").values(), *objects("Deployment").values()]:
        assert one["spec"]["selector"]["matchLabels"] == one["spec"]["template"]["metadata"]["labels"]
    for service in objects("Service").values():
        pod = pods()[service["spec"]["selector"]["app"]]
        named = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    for policy in objects("NetworkPolicy").values():
        assert policy["spec"]["podSelector"]["matchLabels"]["app"] in pods()


@pytest.fixture
def chart() -> Path:
    folder = os.environ.get("PRODUCTION_STACK")
    if not folder:
        pytest.skip("PRODUCTION_STACK does not name the chart's folder")
    return Path(folder)


def test_the_charts_schema_takes_the_values(chart: Path) -> None:
    schema = json.loads((chart / "values.schema.json").read_text())
    defaults = yaml.safe_load((chart / "values.yaml").read_text())
    for values in (VALUES, _merged(defaults, VALUES)):
        jsonschema.Draft202012Validator(schema).validate(values)


def test_the_charts_templates_read_every_value(chart: Path) -> None:
    templates = "\n".join(path.read_text() for path in (chart / "templates").glob("*"))
    for prefix, names in {
        r"\$?modelSpec\.": ENGINE.keys(),
        r"(?:\$?modelSpec\.vllmConfig)?\.": ENGINE["vllmConfig"].keys(),
        r"\.Values\.routerSpec\.": VALUES["routerSpec"].keys(),
        r"\.Values\.cacheserverSpec\.": VALUES["cacheserverSpec"].keys(),
        r"\.Values\.": VALUES.keys(),
    }.items():
        assert not [name for name in names if not re.search(rf"{prefix}{name}\b", templates)]
    assert f'{HASH_SEED["name"]}\n            value: "{HASH_SEED["value"]}"' in templates
    assert "helm-release-name: {{ .Release.Name }}\n" in templates
    assert "model: {{ $modelSpec.name }}\n" in templates


def test_helm_renders_the_chart_with_the_values(chart: Path) -> None:
    if shutil.which("helm") is None:
        pytest.skip("helm is not installed")
    command = ["helm", "template", "arena", str(chart), "--values", str(VALUES_FILE)]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    made = [one for one in yaml.safe_load_all(rendered) if one]
    (vllm,) = (one for one in made if one["metadata"]["name"] == "arena-blend-deployment-vllm")
    container = vllm["spec"]["template"]["spec"]["containers"][0]
    assert all(word in container["command"] for word in ENGINE["vllmConfig"]["extraArgs"])
    assert HASH_SEED in container["env"]
    assert {one["metadata"]["name"] for one in VALUES["extraObjects"]} <= {one["metadata"]["name"] for one in made}


def _merged(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """As Helm does it: mappings are merged, anything else is replaced."""
    merged = dict(defaults)
    for key, value in own.items():
        default = defaults.get(key)
        merged[key] = _merged(default, value) if isinstance(default, dict) and isinstance(value, dict) else value
    return merged
