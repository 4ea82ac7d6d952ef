"""compose.yaml as Docker's own compose and bake read it. Neither needs an engine for that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvarena.home import project_root
from kvarena.stack.settings import Settings
from stack.test_compose import seconds, services_of, with_optional

TOOLS = project_root() / ".venv" / "tools" / "docker"
Docker = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Docker:
    """`docker` with these words, and without any setting of this machine."""
    found = shutil.which("docker", path=f"{TOOLS}/usr/bin{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("no docker here")
    config = tmp_path_factory.mktemp("docker")
    plugins = [str(TOOLS / "usr" / "libexec" / "docker" / "cli-plugins")]
    (config / "config.json").write_text(json.dumps({"cliPluginsExtraDirs": plugins}))
    environment = {key: value for key, value in os.environ.items() if key.lower() not in Settings.model_fields}
    environment |= {"DOCKER_CONFIG": str(config), "DOCKER_HOST": "unix:///nothing"}

    def run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [found, *words], cwd=project_root(), env=environment | settings, capture_output=True, text=True, check=False
        )

    if run("compose", "version").returncode or run("buildx", "version").returncode:
        pytest.skip("docker without compose or buildx")
    return run


def read(docker: Docker, profile: str, *files: str, **settings: str) -> dict[str, Any]:
    words = [word for name in ("compose.yaml", *files) for word in ("-f", name)]
    words += [word for name in sorted(with_optional(profile)) for word in ("--profile", name)]
    done = docker("compose", *words, "config", "--format", "json", **settings)
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@pytest.mark.parametrize(
    ("profile", "files"),
    [("cpu", ()), ("gpu", ()), ("gpu", ("compose.gpu-share.yaml",)), ("ai100", ()), ("observability", ())],
)
def test_it_reads_what_the_other_reader_does(docker: Docker, profile: str, files: tuple[str, ...]) -> None:
    ours, theirs = read(docker, profile, *files), services_of(profile, *files)
    assert set(ours) == set(theirs)
    for name, service in ours.items():
        other = theirs[name]
        assert service.get("container_name") == other.get("container_name")
        assert service["image"] == other["image"]
        ports = [f"{port['host_ip']}:{port['published']}:{port['target']}" for port in service.get("ports", [])]
        assert ports == list(map(str, other.get("ports", [])))
        assert service["healthcheck"]["test"] == other["healthcheck"]["test"]
        depends_on = {on: how["condition"] for on, how in service.get("depends_on", {}).items()}
        assert depends_on == {on: how["condition"] for on, how in other.get("depends_on", {}).items()}


def test_settings_of_the_environment_reach_the_servers(docker: Docker) -> None:
    services = read(docker, "cpu", MODEL="town", BLEND_RATIO="0.3", CONTAINER_MEMORY_GB="7", HF_TOKEN="a secret")
    blend = services["blend"]
    assert (blend["environment"]["MODEL"], blend["environment"]["BLEND_RATIO"]) == ("town", "0.3")
    assert int(blend["mem_limit"]) == 7 << 30
    assert "a secret" not in json.dumps(services)


def test_every_image_can_be_baked(docker: Docker) -> None:
    done = docker("buildx", "bake", "--print", "-f", "compose.yaml")
    assert done.returncode == 0, done.stderr
    baked = json.loads(done.stdout)
    targets = baked["target"]
    assert set(baked["group"]["default"]["targets"]) == set(targets)
    tags = {tag.partition(":")[0] for target in targets.values() for tag in target["tags"]}
    assert {"kvarena-cpu", "kvarena-gpu", "kvarena-engines", "kvarena-ai100"} <= tags
    for target in targets.values():
        assert (project_root() / target["dockerfile"]).is_file()
        assert Path(project_root(), target["context"]).resolve() == project_root()


def test_health_checks_wait_as_long_as_they_say(docker: Docker) -> None:
    for service in read(docker, "gpu").values():
        assert seconds_of(service["healthcheck"]["start_period"]) >= 60


def seconds_of(duration: str) -> float:
    """Of Go's durations: 2h0m0s."""
    parts = [part for part in duration.replace("h", "h ").replace("m", "m ").replace("s", "s ").split() if part]
    return sum(seconds(part) for part in parts)
