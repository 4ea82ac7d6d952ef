"""compose.yaml against the compose specification's schema, two independent readers of it, and the stack's own list.

The readers are podman-compose, and Docker's own compose and bake, which need no engine for that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvarena.contenders.spec import ComposeProfile
from kvarena.home import Home, project_root
from kvarena.stack.containers import compose_service, contenders_of, optional_profile
from kvarena.stack.plan import make_plan
from kvarena.stack.serve import service_of_this_container
from kvarena.stack.service import Service
from kvarena.stack.services import build_services
from kvarena.stack.settings import SECRETS, SPECS, Settings, load_settings

# --- Read by podman-compose ---


PROFILES: tuple[ComposeProfile, ...] = ("cpu", "gpu")
OF_THE_HOST = {"run_in", "ui", "container_memory_gb", "models_dir", "local_hf_home", "data_dir", "results_dir"}
"""Settings that the containers themselves have no use for; ports and secrets are others."""
DECIDED_BY_THE_PROFILE = {"profile", "model", "contenders", "ai100_runtime", "ai100_topics_file", "gpu_share"}


@cache
def composed(profile: str, *files: str) -> dict[str, Any]:
    """What podman-compose reads in the files with this profile and its optional contenders, without any setting of this
    machine."""
    options = [word for name in ("compose.yaml", *files) for word in ("-f", name)]
    options += [word for name in with_optional(profile) for word in ("--profile", name)]
    command = [sys.executable, "-m", "podman_compose", "--dry-run", *options, "config"]
    environment = {key: value for key, value in os.environ.items() if key.lower() not in Settings.model_fields}
    done = subprocess.run(command, cwd=project_root(), env=environment, capture_output=True, text=True, check=True)
    read: dict[str, Any] = yaml.safe_load(done.stdout)
    return read


def with_optional(profile: str) -> set[str]:
    """The profile itself, and those of the contenders that it has and that are off by default."""
    of_stack = next((own for own in PROFILES if own == profile), None)
    if of_stack is None:
        return {profile}
    return {profile, *(own for name in contenders_of(of_stack) if (own := optional_profile(name, of_stack)))}


def services_of(profile: str, *files: str) -> dict[str, dict[str, Any]]:
    """The services of one profile, by their names in compose.yaml."""
    everything: dict[str, dict[str, Any]] = composed(profile, *files)["services"]
    return {name: own for name, own in everything.items() if with_optional(profile).intersection(own["profiles"])}


def listed(profile: ComposeProfile, home: Home, tmp_path: Path) -> dict[str, Service]:
    """The services that processes would have, by the names that compose.yaml gives them."""
    settings = load_settings(tmp_path / ".env", profile="cpu", contenders=contenders_of(profile))
    return {
        compose_service(service.name, profile): service for service in build_services(make_plan(settings, home), home)
    }


def environment_of(service: Mapping[str, Any]) -> dict[str, str]:
    given = service["environment"]
    pairs = given.items() if isinstance(given, dict) else (pair.split("=", 1) for pair in given if "=" in pair)
    return {key: value for key, value in pairs if value is not None}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_services_are_those_of_the_one_list(profile: ComposeProfile, home: Home, tmp_path: Path) -> None:
    assert set(services_of(profile)) == set(listed(profile, home, tmp_path))


def test_contenders_that_are_off_by_default_have_a_profile_each() -> None:
    expected: list[tuple[str, ComposeProfile, str]] = [
        ("lmcache", "cpu", "lmcache"),
        ("lmcache", "gpu", "lmcache-gpu"),
        ("ai100", "gpu", "ai100-gpu"),
    ]
    for name, profile, own in expected:
        service = services_of(profile)[compose_service(name, profile)]
        assert service["profiles"] == [own]
        assert optional_profile(name, profile) == own


@pytest.mark.parametrize("profile", PROFILES)
def test_a_card_runs_beside_the_others(profile: ComposeProfile) -> None:
    together = services_of(profile) | services_of("ai100")
    names = [service["container_name"] for service in together.values()]
    assert len(set(names)) == len(names)
    assert set(services_of("ai100")) == {"ai100-card", "page"}
    assert environment_of(together["ai100-card"])["AI100_RUNTIME"] == "qaic"
    assert {"/dev/accel/accel0", "/opt/qti-aic:/opt/qti-aic:ro"} <= {
        *map(str, together["ai100-card"]["devices"]),
        *map(str, together["ai100-card"]["volumes"]),
    }


def test_the_host_s_cache_of_models_is_mounted_by_default() -> None:
    raw = yaml.safe_load((project_root() / "compose.yaml").read_text())
    for name, service in raw["services"].items():
        mounted = [str(one) for one in service.get("volumes", []) if ":/var/cache/huggingface" in str(one)]
        place = "${LOCAL_HF_HOME:-${HF_HOME:-~/.cache/huggingface}}:/var/cache/huggingface"
        expected = [f"{place}:ro" if name == "page" else place]
        assert mounted == ([] if name in ("prometheus", "grafana") else expected), name


@pytest.mark.parametrize("profile", PROFILES)
def test_ports_and_health_checks_are_those_of_the_one_list(profile: ComposeProfile, home: Home, tmp_path: Path) -> None:
    there_are = services_of(profile)
    for name, service in listed(profile, home, tmp_path).items():
        container = there_are[name]
        assert container["container_name"] == f"kvarena-{service.name}"
        ports = [f"127.0.0.1:{port}:{port}" for port in (service.port, *service.other_ports)]
        assert list(map(str, container["ports"])) == ports
        assert container["healthcheck"]["test"][-1] == service.health_url
        assert seconds(container["healthcheck"]["start_period"]) >= service.start_timeout_s
        assert container["command"] == [service.name]
        depends_on = {compose_service(other, profile): {"condition": "service_healthy"} for other in service.depends_on}
        assert container.get("depends_on", {}) == depends_on


@pytest.mark.parametrize("profile", PROFILES)
def test_every_server_can_be_told_every_setting(profile: ComposeProfile) -> None:
    own = {key for key in Settings.model_fields if not key.endswith("_port")} - {"port_base", *SECRETS}
    raw = yaml.safe_load((project_root() / "compose.yaml").read_text())
    for name, service in raw["services"].items():
        if with_optional(profile).intersection(service["profiles"]):
            known = {key.lower() for key in service["environment"]}
            assert own - OF_THE_HOST - DECIDED_BY_THE_PROFILE <= known, name
            assert known >= {"profile", "model", "contenders"}, name


@pytest.mark.parametrize("profile", ["cpu"])
def test_each_container_becomes_its_service(
    profile: ComposeProfile, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project_root())
    for name, service in listed(profile, home, tmp_path).items():
        with monkeypatch.context() as patch:
            for key, value in environment_of(services_of(profile)[name]).items():
                patch.setenv(key, value)
            patch.delenv("AI100_TOPICS_FILE", raising=False)
            became = service_of_this_container(service.name, home)
        assert (became.name, became.port, became.other_ports) == (service.name, service.port, service.other_ports)
        assert became.health_url == service.health_url
        assert set(service.environment) - {"HF_HUB_OFFLINE", "KVARENA_NOTICE"} <= set(became.environment)


@pytest.mark.parametrize("profile", [*PROFILES, "ai100", "observability"])
def test_no_container_has_more_rights_than_it_needs(profile: str) -> None:
    for name, service in services_of(profile).items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert re.fullmatch(r"\d+g", str(service["mem_limit"])), name
        assert "privileged" not in service, name


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_lmcache_and_its_clients_share_memory_that_outlives_them(profile: ComposeProfile) -> None:
    sharing = {
        name
        for name, service in services_of(profile).items()
        if any("shared-memory" in str(volume) and "/dev/shm" in str(volume) for volume in service.get("volumes", []))
    }
    assert sharing == {compose_service(name, profile) for name in ("lmcache-server", "blend", "lmcache")}
    assert composed(profile)["volumes"]["shared-memory"]["driver_opts"]["type"] == "tmpfs"


def test_vllms_that_share_a_gpu_start_one_after_the_other() -> None:
    apart, together = services_of("gpu"), services_of("gpu", "compose.gpu-share.yaml")
    assert "depends_on" not in apart["plain-gpu"]
    after = {"condition": "service_healthy", "required": False}
    assert together["plain-gpu"]["depends_on"] == {"blend-gpu": after}
    assert together["ai100-gpu"]["depends_on"] == {"blend-gpu": after, "plain-gpu": after}
    assert [environment_of(together[name])["GPU_SHARE"] for name in ("blend-gpu", "plain-gpu")] == ["true", "true"]


def test_the_page_writes_results_and_knows_what_the_host_calls_things() -> None:
    page = services_of("cpu")["page"]
    mounts = {mount["target"]: mount for mount in page["volumes"] if isinstance(mount, dict)}
    assert not mounts["/kvarena/results"].get("read_only")
    environment = environment_of(page)
    assert json.loads(environment["KVARENA_PUBLIC_URLS"]) == {
        name: f"http://127.0.0.1:{spec.port}" for name, spec in SPECS.items()
    }
    folders = json.loads(environment["KVARENA_HOST_FOLDERS"])
    sources = {target: mount["source"] for target, mount in mounts.items()}
    assert folders.pop("/var/lib/kvarena/results") == sources["/kvarena/results"]
    assert folders.pop("/var/cache/huggingface").endswith("/.cache/huggingface")
    assert folders == sources


def test_prometheus_and_grafana_are_reached_on_the_loopback_only_and_pinned() -> None:
    watching = services_of("observability")
    assert set(watching) == {"prometheus", "grafana"}
    for service in watching.values():
        assert all(str(port).startswith("127.0.0.1:") for port in service["ports"])
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])


def test_secrets_are_in_no_environment_and_the_page_has_no_use_for_the_token() -> None:
    for profile in (*PROFILES, "ai100"):
        for name, service in services_of(profile).items():
            assert not {key.upper() for key in SECRETS}.intersection(environment_of(service))
            expected = ["kvarena_api_key"] if "page" in name else ["hf_token", "kvarena_api_key"]
            expected += ["lmcache_l2_password"] if "server" in name else []
            assert service["secrets"] == expected, name


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu-share.yaml"])
def test_the_compose_specification_allows_it(name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", name]
    checked = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# --- Read by Docker's own compose and bake ---


TOOLS = project_root() / ".venv" / "tools" / "docker"
Docker = Callable[..., subprocess.CompletedProcess[str]]


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_settings_of_the_environment_reach_the_servers(docker: Docker) -> None:
    services = read(docker, "cpu", MODEL="town", BLEND_RATIO="0.3", CONTAINER_MEMORY_GB="7", HF_TOKEN="a secret")
    blend = services["blend"]
    assert (blend["environment"]["MODEL"], blend["environment"]["BLEND_RATIO"]) == ("town", "0.3")
    assert int(blend["mem_limit"]) == 7 << 30
    assert "a secret" not in json.dumps(services)


@pytest.mark.slow
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


@pytest.mark.slow
def test_health_checks_wait_as_long_as_they_say(docker: Docker) -> None:
    for service in read(docker, "gpu").values():
        assert seconds(service["healthcheck"]["start_period"]) >= 60


def seconds(duration: str) -> float:
    """Of compose's durations and Go's: 10s, 2m, 2h0m0s."""
    return sum(
        float(number) * {"s": 1, "m": 60, "h": 3600}[unit] for number, unit in re.findall(r"(\d+)([smh])", duration)
    )
