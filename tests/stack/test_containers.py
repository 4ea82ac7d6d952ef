"""The stack in containers: when it is, what Compose is told, and its life behind the same commands as processes.

The engine is a stand-in that notes what it is asked (`fake_docker.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from kvarena.home import Home, StackError, project_root
from kvarena.model import DEFAULT_CPU_MODEL, default_model_folder
from kvarena.stack import lifecycle, machine
from kvarena.stack.containers import (
    USER_ID,
    are_wanted,
    check_download_folder,
    compose_environment,
    make_results_folder,
    plan_deployment,
)
from kvarena.stack.doctor import diagnose
from kvarena.stack.record import Record, read_record
from kvarena.stack.service import ServiceFailedError
from kvarena.stack.settings import Settings, load_settings
from kvarena.stack.status import stack_status
from support.lmcache_server import free_port

FAKE_DOCKER = Path(__file__).parents[1] / "support" / "fake_docker.py"


class FakeEngine:
    """`docker` on the PATH, and what it was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "engine"
        program = folder / "bin" / "docker"
        program.parent.mkdir()
        self.folder.mkdir()
        words = shlex.join([sys.executable, str(FAKE_DOCKER), str(self.folder)])
        program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")
        self.has()

    def has(self, **ports: int) -> None:
        """The containers that there will be, with the ports of their health addresses."""
        (self.folder / "ports.json").write_text(json.dumps({f"kvarena-{name}": port for name, port in ports.items()}))

    @property
    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def call(self, word: str) -> dict[str, Any]:
        return next(call for call in self.calls if word in call["arguments"])


@pytest.fixture
def engine(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    return FakeEngine(tmp_path, monkeypatch)


@pytest.fixture
def no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    there_are = ["0", "1"]
    monkeypatch.setattr(machine, "visible_gpus", lambda: there_are)
    return there_are


def with_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cards", lambda: [Path("/dev/accel/accel0")])


def kvarena(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from kvarena.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that isn't there, whatever this machine reaches."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def enabled(record: Record) -> set[str]:
    """The services that Compose takes with the record's options: those of their profiles."""
    parser = argparse.ArgumentParser()
    for option in ("--project-directory", "--file", "--profile"):
        parser.add_argument(option, action="append")
    options = parser.parse_args(record.compose[2:])
    services = yaml.safe_load(Path(options.file[0]).read_text())["services"]
    return {name for name, own in services.items() if set(own["profiles"]) & set(options.profile)}


def settings(tmp_path: Path, **chosen: object) -> Settings:
    return load_settings(tmp_path / ".env", **chosen)


@pytest.mark.usefixtures("engine", "gpus")
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, True),
        ({"profile": "gpu"}, True),
        ({"profile": "cpu"}, False),
        ({"profile": "cpu", "run_in": "containers"}, True),
        ({"profile": "gpu", "run_in": "processes"}, False),
        ({"profile": "ai100"}, True),
    ],
)
def test_gpus_and_cards_are_used_in_containers(tmp_path: Path, chosen: dict[str, object], expected: bool) -> None:
    assert are_wanted(settings(tmp_path, **chosen)) == expected


@pytest.mark.usefixtures("engine")
def test_a_cpu_is_used_by_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "visible_gpus", list)
    assert not are_wanted(settings(tmp_path))
    with_a_card(monkeypatch)
    assert are_wanted(settings(tmp_path))
    assert not are_wanted(settings(tmp_path, contenders="plain"))


@pytest.mark.usefixtures("no_engine", "gpus")
def test_without_an_engine_processes_are_used_unless_containers_were_asked_for(tmp_path: Path) -> None:
    assert not are_wanted(settings(tmp_path))
    for chosen in ({"run_in": "containers"}, {"profile": "ai100"}):
        with pytest.raises(StackError, match="no Docker engine with Compose answers"):
            are_wanted(settings(tmp_path, **chosen))


@pytest.mark.usefixtures("gpus")
def test_two_gpus_are_not_shared_and_one_is(home: Home, tmp_path: Path, gpus: list[str]) -> None:
    shared = str(project_root() / "compose.gpu-share.yaml")
    two = plan_deployment(settings(tmp_path, profile="gpu"), home)
    assert two.compose_services == ("lmcache-server-gpu", "blend-gpu", "plain-gpu", "page")
    assert enabled(two.record) == set(two.compose_services), "no contender that is off by default"
    assert shared not in two.record.compose
    assert shared in plan_deployment(settings(tmp_path, profile="gpu", gpu_share=True), home).record.compose
    gpus.pop()
    one = plan_deployment(settings(tmp_path, profile="gpu"), home)
    assert shared in one.record.compose
    plain = one.record.service("plain")
    assert plain is not None
    assert plain.depends_on == ("blend",), "as compose.gpu-share.yaml has it"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("profile", "has_card", "expected"),
    [
        ("cpu", False, ("lmcache-server", "blend", "plain", "ai100", "page")),
        ("cpu", True, ("lmcache-server", "blend", "plain", "ai100-card", "page")),
        ("gpu", False, ("lmcache-server-gpu", "blend-gpu", "plain-gpu", "ai100-gpu", "page")),
        ("gpu", True, ("lmcache-server-gpu", "blend-gpu", "plain-gpu", "ai100-card", "page")),
        ("ai100", False, ("lmcache-server-gpu", "blend-gpu", "plain-gpu", "ai100-card", "page")),
    ],
)
def test_one_stack_holds_servers_on_each_device(
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    profile: str,
    has_card: bool,
    expected: tuple[str, ...],
) -> None:
    if has_card:
        with_a_card(monkeypatch)
        monkeypatch.setenv("AI100_DEVICE", "/dev/accel/accel0")
    deployment = plan_deployment(settings(tmp_path, profile=profile, contenders="blend,plain,ai100"), home)
    assert deployment.compose_services == expected
    on_card = "ai100-card" in expected
    assert deployment.record.containers["ai100"] == ("kvarena-ai100-card" if on_card else "kvarena-ai100")
    assert deployment.environment["AI100_RUNTIME"] == ("qaic" if on_card else "host")
    assert deployment.plan.sharing == (("blend", "plain") if on_card else ("blend", "plain", "ai100"))
    shared = str(project_root() / "compose.gpu-share.yaml")
    assert (shared in deployment.record.compose) == ("ai100-gpu" in expected), "three servers, two GPUs"
    assert deployment.environment["GPU_SHARE"] == "false"


@pytest.mark.parametrize(
    ("num_gpus", "asked", "contenders", "model"),
    [
        (2, "auto", ("blend", "plain", "ai100"), "mistralai/Mistral-7B-Instruct-v0.2"),
        (0, "auto", ("ai100",), "meta-llama/Llama-3.2-1B-Instruct"),
        (2, "ai100", ("ai100",), "meta-llama/Llama-3.2-1B-Instruct"),
        (2, "gpu", ("blend", "plain"), "mistralai/Mistral-7B-Instruct-v0.2"),
        (2, "cpu", ("blend", "plain"), "SmolLM2-135M-Instruct"),
    ],
)
def test_a_card_is_used_beside_gpus(
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_gpus: int,
    asked: str,
    contenders: tuple[str, ...],
    model: str,
) -> None:
    with_a_card(monkeypatch)
    monkeypatch.setenv("AI100_DEVICE", "/dev/accel/accel0")
    monkeypatch.setattr(machine, "visible_gpus", lambda: [str(index) for index in range(num_gpus)])
    plan = plan_deployment(settings(tmp_path, profile=asked), home).plan
    assert (plan.contenders, plan.model.name) == (contenders, model)


@pytest.mark.usefixtures("gpus")
def test_a_profile_has_its_contenders(home: Home, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="profile gpu has no contender prefix in containers; choose from blend, plain"):
        plan_deployment(settings(tmp_path, profile="gpu", contenders="blend,prefix"), home)


@pytest.mark.usefixtures("engine", "no_hub")
def test_a_doctor_says_what_containers_would_be(home: Home, tmp_path: Path) -> None:
    found = diagnose(lambda: settings(tmp_path, run_in="containers", profile="cpu", model="org/absent"), home)
    assert found.wanted["runs in"] == "containers, profile cpu"
    assert found.facts["Docker"] == "an engine answers, with Compose"
    assert "org/absent is not on this machine" in {one.name: one.problem for one in found.checks}["model"]


@pytest.mark.usefixtures("engine", "gpus", "no_hub")
def test_a_model_that_cant_be_had_is_told_before_anything_starts(
    engine: FakeEngine, home: Home, tmp_path: Path, console: Console
) -> None:
    chosen = settings(tmp_path, profile="gpu", local_hf_home=tmp_path / "cache", port_base=free_port() // 2 + 1024)
    with pytest.raises(StackError, match=r"Mistral-7B-Instruct-v0.2 is not on this machine, and the hub at .* reached"):
        lifecycle.up(chosen, home, console)
    assert not [call for call in engine.calls if "--no-start" in call["arguments"]]


@pytest.mark.parametrize(
    ("owner", "group", "mode", "can_write"),
    [
        (USER_ID, 0, 0o755, True),
        (USER_ID, 0, 0o555, False),
        (0, 0, 0o755, False),
        (0, 0, 0o777, True),
        (0, USER_ID, 0o775, True),
        (0, USER_ID, 0o757, False),
    ],
)
def test_the_containers_user_can_write_where_models_are_downloaded_to(
    tmp_path: Path, owner: int, group: int, mode: int, can_write: bool
) -> None:
    folder = tmp_path / "huggingface"
    if os.getuid() != 0:
        pytest.skip("only root can give files away")
    for path in (folder, folder / "hub"):
        path.mkdir()
        path.chmod(0o777)
        os.chown(path, owner, group)
    (folder / "hub").chmod(mode)
    with nullcontext() if can_write else pytest.raises(StackError, match="user 1000, whom containers run as, can't"):
        check_download_folder(folder)


def test_the_host_s_cache_of_models_is_mounted(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    default = plan_deployment(settings(tmp_path, profile="cpu"), home).environment["LOCAL_HF_HOME"]
    assert default == str(Path("~/.cache/huggingface").expanduser())
    chosen = plan_deployment(settings(tmp_path, profile="cpu", local_hf_home=tmp_path), home)
    assert chosen.environment["LOCAL_HF_HOME"] == str(tmp_path)


def test_images_bring_the_default_model(home: Home, tmp_path: Path) -> None:
    deployment = plan_deployment(settings(tmp_path, profile="cpu"), home)
    assert deployment.environment["MODEL"] == DEFAULT_CPU_MODEL
    assert not deployment.plan.model.is_on_hub, "nothing is asked for it"
    made_here = default_model_folder(home)
    made_here.mkdir(parents=True)
    (made_here / "config.json").write_text("{}")
    assert plan_deployment(settings(tmp_path, profile="cpu"), home).environment["MODELS_DIR"] == str(made_here.parent)


def test_the_contender_lmcache_brings_its_profile(home: Home, tmp_path: Path) -> None:
    deployment = plan_deployment(settings(tmp_path, profile="cpu", contenders="plain,lmcache", ui=False), home)
    assert deployment.compose_services == ("lmcache-server", "plain", "lmcache")
    assert set(deployment.compose_services) <= enabled(deployment.record)
    without = plan_deployment(settings(tmp_path, profile="cpu", contenders="plain"), home)
    assert "lmcache" not in enabled(without.record)


def test_every_setting_reaches_compose_and_secrets_do_not(home: Home, tmp_path: Path) -> None:
    chosen = settings(
        tmp_path, profile="cpu", contenders="plain,blend", port_base=9000, hf_token="hf_x", blend_ratio=0.3, ui=False
    )
    deployment = plan_deployment(chosen, home)
    environment = deployment.environment
    assert environment["CONTENDERS"] == "blend,plain"
    assert (environment["BLEND_PORT"], environment["LMCACHE_HTTP_PORT"]) == ("9000", "9503")
    assert environment["BLEND_RATIO"] == "0.3"
    assert deployment.compose_services == ("lmcache-server", "blend", "plain")
    assert "hf_x" not in json.dumps([dict(environment), deployment.record.compose])
    assert "PROFILE" not in environment, "each container has its own"


def test_a_local_model_is_mounted_wherever_it_is(home: Home, tmp_path: Path) -> None:
    model = tmp_path / "models" / "mine"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    environment = plan_deployment(settings(tmp_path, profile="cpu", model=str(model)), home).environment
    assert environment["MODELS_DIR"] == str(model.parent)
    assert environment["MODEL"] == "backend/models/mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_root_gives_an_empty_folder_of_results_to_the_page(tmp_path: Path) -> None:
    make_results_folder(tmp_path / "results")
    assert (tmp_path / "results").stat().st_uid == USER_ID
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "eval.json").write_text("{}")
    make_results_folder(tmp_path / "mine")
    assert (tmp_path / "mine").stat().st_uid == 0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_life_of_a_stack_in_containers(engine: FakeEngine, home: Home, tmp_path: Path, console: Console) -> None:
    ports = {
        key: free_port() for key in ("lmcache_server_port", "lmcache_http_port", "blend_port", "plain_port", "ui_port")
    }
    chosen = settings(
        tmp_path, run_in="containers", profile="cpu", hf_token="hf_x", results_dir=tmp_path / "results", **ports
    )
    engine.has(
        **{"lmcache-server": ports["lmcache_http_port"]},
        blend=ports["blend_port"],
        plain=ports["plain_port"],
        page=ports["ui_port"],
    )

    lifecycle.up(chosen, home, console)

    made = engine.call("--no-start")
    assert made["arguments"][-4:] == ["lmcache-server", "blend", "plain", "page"]
    assert "hf_x" not in json.dumps(made), "neither argument nor variable"
    token = Path(made["environment"]["HF_TOKEN_FILE"])
    assert token.read_text() == "hf_x"
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    order = [call["arguments"][1] for call in engine.calls if call["arguments"][0] == "start"]
    assert order.index("kvarena-lmcache-server") < order.index("kvarena-blend"), "which depends on it"

    status = stack_status(home)
    assert {service.name: service.state for service in status.services} == {
        "lmcache-server": "healthy",
        "blend": "healthy",
        "plain": "healthy",
        "page": "healthy",
    }
    assert {service.log for service in status.services} >= {"docker logs kvarena-blend"}

    shown = kvarena("logs", "plain", "-n", "5")
    assert shown.stderr.startswith("listening on"), "docker logs shows standard error as such"
    unknown = kvarena("logs", "simllm")
    assert "no log of 'simllm'; there are lmcache-server, blend, plain, page" in unknown.stderr

    before = {service.name: service.pid for service in status.services}
    lifecycle.restart("plain", home, console)
    after = {service.name: service.pid for service in stack_status(home).services}
    assert {name for name in before if before[name] != after[name]} == {"plain"}

    lifecycle.down(home, console)
    assert engine.call("down")
    assert not token.exists()
    assert stack_status(home).exit_code == 3
    assert read_record(home) is None


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_container_that_dies_is_told_of_with_its_log_and_nothing_is_left(
    engine: FakeEngine, home: Home, tmp_path: Path, console: Console, is_restarted: bool
) -> None:
    port = free_port()
    chosen = settings(
        tmp_path,
        run_in="containers",
        profile="cpu",
        contenders="plain",
        plain_port=port,
        ui=False,
        results_dir=tmp_path / "results",
    )
    engine.has(plain=port)
    (engine.folder / "dies").write_text("restarting" if is_restarted else "exited")
    with pytest.raises(ServiceFailedError) as failed:
        lifecycle.up(chosen, home, console)
    assert "plain died while it was starting" in str(failed.value)
    assert "boom: out of luck" in failed.value.log_tail
    assert failed.value.log_path == "docker logs kvarena-plain"
    assert engine.call("down")
    assert stack_status(home).exit_code == 3


def test_the_memory_limit_follows_the_model(home: Home, tmp_path: Path) -> None:
    from kvarena.stack.plan import make_plan

    model = tmp_path / "large"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with (model / "model.safetensors").open("wb") as weights:
        weights.truncate(20 << 30)  # sparse
    large = settings(tmp_path, profile="cpu", model=str(model), dtype="bfloat16")
    assert int(compose_environment(large, make_plan(large, home))["CONTAINER_MEMORY_GB"]) > 20
    town = settings(tmp_path, profile="cpu")
    assert compose_environment(town, make_plan(town, home))["CONTAINER_MEMORY_GB"] == "8"
