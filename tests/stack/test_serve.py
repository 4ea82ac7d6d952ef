"""A service in a container of its own: its command is the stack's, its peers have names, its secrets are files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvarena.home import Home, StackError
from kvarena.stack import machine
from kvarena.stack.serve import read_secrets, service_of_this_container
from support.command_lines import listens_on, parsed

ALL = "blend,plain,prefix,simllm,ai100,lmcache"


@pytest.fixture(autouse=True)
def _settings_of_the_profile_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROFILE", "cpu")
    monkeypatch.setenv("CONTENDERS", ALL)
    monkeypatch.setattr(machine, "physical_cores", lambda: [(core,) for core in range(12)])


@pytest.mark.parametrize("name", ["lmcache-server", *ALL.split(","), "page"])
def test_every_service_listens_on_every_address_and_is_found_by_its_name(home: Home, name: str) -> None:
    service = service_of_this_container(name, home)
    assert listens_on(service) == {"0.0.0.0"}
    assert "127.0.0.1" not in " ".join(service.command)
    assert f"//{name}:{service.port}" in service.address
    assert "//127.0.0.1:" in service.health_url, "which is asked from inside"


def test_the_blend_finds_lmcache_and_the_page_finds_the_contenders(home: Home) -> None:
    blend = service_of_this_container("blend", home)
    config = parsed(blend)["kv_transfer_config"].kv_connector_extra_config
    assert (config["lmcache_url"], config["lmcache_http_url"]) == (
        "tcp://lmcache-server:5555",
        "http://lmcache-server:8080",
    )
    page = service_of_this_container("page", home)
    told = json.loads(page.environment["KVARENA_CONTENDERS"])
    assert [entry["public_url"] for entry in told[:2]] == ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    (lmcache,) = json.loads(page.environment["KVARENA_SERVICES"])
    assert lmcache["url"] == config["lmcache_http_url"], "over the same network"
    urls = [contender["url"] for contender in told]
    assert urls == [
        "http://blend:8000",
        "http://plain:8001",
        "http://prefix:8002",
        "http://simllm:8003",
        "http://ai100:8004",
        "http://lmcache:8005",
    ]


def test_servers_of_one_machine_share_its_cores(home: Home) -> None:
    shares = [service_of_this_container(name, home).cpus for name in ALL.split(",")]
    assert shares == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]


def test_a_service_runs_whatever_contenders_says(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTENDERS", "plain")
    for name in ("lmcache-server", "blend", "simllm"):
        assert service_of_this_container(name, home).name == name
    with pytest.raises(StackError, match="no service 'blent'; choose one of lmcache-server, blend"):
        service_of_this_container("blent", home)


def test_one_gpu_is_divided_and_two_are_not(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROFILE", "gpu")
    monkeypatch.setenv("CONTENDERS", "blend,plain")
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0", "1"])

    def gpu_and_share(name: str) -> tuple[str, float]:
        service = service_of_this_container(name, home)
        return service.environment["CUDA_VISIBLE_DEVICES"], parsed(service)["gpu_memory_utilization"]

    assert [gpu_and_share(name) for name in ("blend", "plain")] == [("0", 0.9), ("1", 0.9)]
    monkeypatch.setenv("GPU_SHARE", "true")
    assert [gpu_and_share(name) for name in ("blend", "plain")] == [("0", 0.45), ("0", 0.45)]


def test_secrets_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "hf_token").write_text("hf_x\n")
    (tmp_path / "empty").touch()
    (tmp_path / "unset").symlink_to("/dev/null")
    assert read_secrets(tmp_path) == {"HF_TOKEN": "hf_x"}
    assert read_secrets(tmp_path / "nowhere") == {}


def test_the_health_check_needs_neither_torch_nor_pydantic() -> None:
    program = "import sys, kvarena.stack.health; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "pydantic", "numpy"}.intersection(modules)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("BLEND_RATIO", "2", "error: BLEND_RATIO"),
        ("MODEL", "org/absent", "error: org/absent is not on this machine, and the hub at http://127.0.0.1:9 can't be"),
    ],
)
def test_what_cant_run_ends_the_container_with_its_message(home: Home, setting: str, value: str, message: str) -> None:
    environment = {**os.environ, "KVARENA_HOME": str(home.path), "HF_ENDPOINT": "http://127.0.0.1:9", setting: value}
    command = [sys.executable, "-m", "kvarena.stack.serve", "blend"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert message in ended.stderr
