"""The stack in containers: whether it is wanted, what `docker compose` is told of the settings, and what runs them.

`compose.yaml` is the list of containers, each of which takes its command from `services`. Here the settings become the
variables that it has, and its services the ones of the record. `Containers` asks, starts and stops them through the
command `docker`, as `supervisord` does with processes, so status, logs, restart, warm and down are the same for both.
The engine restarts what crashes.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pydantic import SecretStr

from kvarena.contenders.servers import GIB
from kvarena.contenders.spec import STARTED_BY_DEFAULT, ComposeProfile
from kvarena.home import Home, StackError, project_root
from kvarena.model import DEFAULT_CPU_MODEL, cached_snapshot, default_hf_home
from kvarena.stack import machine
from kvarena.stack.plan import Plan, make_plan, uses_card
from kvarena.stack.preflight import (
    Check,
    check_data_folder,
    check_gpu_memory,
    check_model,
    check_ports,
    estimate_memory,
)
from kvarena.stack.record import Record
from kvarena.stack.service import ProcessInfo, Service, SupervisorGoneError
from kvarena.stack.services import build_services, record_of
from kvarena.stack.settings import SPECS, Settings

CARD_SERVICE = "ai100-card"
CARD_PROFILE = "ai100"
USER_ID = 1000
"""Of the servers in the images."""
SPARE_BYTES = 2 * GIB
CALL_TIMEOUT_S = 120.0
LOG_LINES = 200
SUPERVISOR_STATES = {
    "created": "STOPPED",
    "running": "RUNNING",
    "restarting": "BACKOFF",
    "removing": "STOPPING",
    "paused": "STOPPED",
    "exited": "EXITED",
    "dead": "FATAL",
}
"""What supervisord would call the engine's states."""


def are_wanted(settings: Settings) -> bool:
    """`RUN_IN` decides; auto is containers for GPUs and cards, asked for or there, where a Docker engine answers.

    Raises `StackError` where containers are asked for and none can be run.
    """
    asked = settings.profile
    if settings.run_in == "processes" and asked != "ai100":
        return False
    settings = resolved(settings)
    if settings.run_in == "auto" and settings.profile == "cpu" and not uses_card(settings):
        return False
    if engine_answers():
        return True
    if settings.run_in == "containers" or asked == "ai100":
        raise StackError(
            f"RUN_IN is {settings.run_in} and PROFILE is {asked}, and no Docker engine with Compose answers "
            "(docker info, docker compose version); start it, or take RUN_IN=processes with PROFILE cpu or gpu"
        )
    return False


def resolved(settings: Settings) -> Settings:
    """The settings with what they leave to the machine: the profile `cpu` or `gpu`, and the card for `ai100` where
    there is one; it runs by default then, alone, or beside those on GPUs."""
    profile = settings.profile if settings.profile in ("cpu", "gpu") else "gpu" if machine.visible_gpus() else "cpu"
    runtime, contenders = settings.of_contender("ai100").runtime, settings.contenders
    if settings.profile == "ai100" or (runtime in (None, "auto") and machine.cards()):
        runtime = "qaic"
    if runtime == "qaic" and settings.profile in ("auto", "ai100") and "contenders" not in settings.model_fields_set:
        beside = STARTED_BY_DEFAULT if (settings.profile, profile) == ("auto", "gpu") else ()
        contenders = (*beside, "ai100")
    changed = {"profile": profile, "contenders": contenders, "ai100_runtime": runtime or "host"}
    return settings.model_copy(update=changed)


@dataclass(frozen=True)
class Deployment:
    """What shall run, and what `docker compose` has to be told for it. Secrets are in neither."""

    record: Record
    plan: Plan
    compose_services: tuple[str, ...]
    environment: Mapping[str, str]

    def checks(self, services: Sequence[Service], token: str | None) -> Iterator[Check]:
        """Those of processes that containers need as well, and what is theirs alone."""
        yield "documents", partial(check_data_folder, self.plan.data_dir)
        yield "ports", partial(check_ports, services)
        yield "model", partial(check_model, self.plan, services, token)
        yield "GPU memory", partial(check_gpu_memory, self.plan, services)
        folder = Path(self.environment["LOCAL_HF_HOME"])
        if self.plan.model.is_on_hub and cached_snapshot(self.plan.model.name, folder) is None:
            yield "folder for downloads", partial(check_download_folder, folder)

    def start(self, home: Home, record: Record, secrets: Mapping[str, str]) -> Containers:
        """Builds the images, with the engine's own progress on the terminal, and makes the containers without starting
        them. Secrets go into files that only this user can reach, and that the containers are given. Raises
        `StackError`.
        """
        environment = {**self.environment, **_write_secrets(home, secrets)}
        # The engine would make them, for root.
        Path(environment["LOCAL_HF_HOME"]).mkdir(parents=True, exist_ok=True)
        make_results_folder(Path(environment["RESULTS_DIR"]))
        command = [*record.compose, "up", "--build", "--no-start", *self.compose_services]
        if subprocess.run(command, env={**os.environ, **environment}, check=False).returncode != 0:
            raise StackError("docker compose could not make the containers; its own message is above")
        return Containers(record)


def plan_deployment(settings: Settings, home: Home) -> Deployment:
    """Raises `StackError` for contenders that the profile doesn't have, and what `make_plan` raises."""
    settings = resolved(settings)
    profile: ComposeProfile = "gpu" if settings.profile == "gpu" else "cpu"
    there_are = contenders_of(profile)
    if missing := [name for name in settings.contenders if name not in there_are]:
        raise StackError(
            f"the profile {profile} has no contender {missing[0]} in containers; choose from {', '.join(there_are)}, "
            "or take RUN_IN=processes"
        )
    changed: dict[str, object] = {"local_hf_home": settings.local_hf_home or default_hf_home()}
    if settings.model is None and profile == "cpu" and not uses_card(settings):
        changed["model"] = DEFAULT_CPU_MODEL  # images have it where this machine hasn't
    settings = settings.model_copy(update=changed)
    plan = make_plan(settings, home)
    listed = build_services(plan, home)
    on_card = {name: CARD_SERVICE for name in plan.contenders if name not in plan.sharing}
    containers = {service.name: f"kvarena-{on_card.get(service.name, service.name)}" for service in listed}
    shares_gpu = profile == "gpu" and len(plan.gpus) < len(plan.sharing)
    files = ["compose.yaml", *(["compose.gpu-share.yaml"] if shares_gpu else [])]
    compose = ["docker", "compose", "--project-directory", str(project_root())]
    compose += [word for name in files for word in ("--file", str(project_root() / name))]
    own = [optional_profile(name, profile) if name in plan.sharing else CARD_PROFILE for name in plan.contenders]
    compose += [word for name in (profile, *filter(None, own)) for word in ("--profile", name)]
    return Deployment(
        record=record_of(
            plan,
            (dataclasses.replace(one, log_path=f"docker logs {containers[one.name]}") for one in listed),
            bool(settings.api_key),
            compose=tuple(compose),
            containers=containers,
        ),
        plan=plan,
        compose_services=tuple(on_card.get(one.name, compose_service(one.name, profile)) for one in listed),
        environment=compose_environment(settings, plan) | (_card() if on_card else {}),
    )


def compose_service(name: str, profile: ComposeProfile) -> str:
    """What `compose.yaml` calls a service. The containers of the profiles cpu and gpu have the same names."""
    return f"{name}-gpu" if profile == "gpu" and name != "page" else name


def contenders_of(profile: ComposeProfile) -> tuple[str, ...]:
    """Those that the profile has, those that are off by default included."""
    return tuple(name for name, spec in SPECS.items() if profile in spec.container.profiles)


def optional_profile(name: str, profile: ComposeProfile) -> str:
    """The profile that a contender stands in which is off by default; empty for one that is in `profile` itself."""
    return compose_service(name, profile) if profile in SPECS[name].container.optional_in else ""


def compose_environment(settings: Settings, plan: Plan) -> dict[str, str]:
    """The variables of `compose.yaml`: every setting that was made, wherever, and what the plan decided."""
    made = {key: _as_text(getattr(settings, key)) for key in settings.model_fields_set - {"profile"}}
    environment = {key.upper(): text for key, text in made.items() if text}
    ports = {f"{name}_PORT".upper(): str(port) for name, port in plan.ports.items()}
    environment |= ports | {
        "UI_PORT": ports.pop("PAGE_PORT"),
        "CONTENDERS": ",".join(plan.contenders),
        "DATA_DIR": str(plan.data_dir),
        "RESULTS_DIR": str(plan.results_dir),
        "MODEL": plan.model.name,
        "GPU_SHARE": str(len(plan.gpus) == 1).lower(),
    }
    if plan.model.is_local:
        folder = Path(plan.model.name)
        environment |= {"MODELS_DIR": str(folder.parent), "MODEL": f"backend/models/{folder.name}"}
    if plan.dtype is not None:
        environment["DTYPE"] = plan.dtype
    if settings.container_memory_gb is None and plan.profile == "cpu":
        # What one server is estimated to need alone, and some more.
        alone = estimate_memory(dataclasses.replace(plan, contenders=plan.contenders[:1]))
        environment["CONTAINER_MEMORY_GB"] = str(max(8, -(-(alone.total_bytes + SPARE_BYTES) // GIB)))
    return environment


def _card() -> dict[str, str]:
    """The first card, and the group that may use it, unless the environment names others."""
    device = next(iter(machine.cards()), None)
    if device is None or "AI100_DEVICE" in os.environ:
        return {}
    return {"AI100_DEVICE": str(device), "AI100_DEVICE_GROUP": str(device.stat().st_gid)}


def check_download_folder(folder: Path) -> None:
    """The containers' user can write where models are downloaded to. A folder is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)  # the engine would make it, for root
    if not all(_can_be_written(path) for path in (folder, folder / "hub") if path.exists()):
        raise StackError(
            f"the model is downloaded into {folder}, and user {USER_ID}, whom containers run as, can't write there; "
            f"let that user (sudo chown -R {USER_ID} {folder}), or name another folder in LOCAL_HF_HOME"
        )


def make_results_folder(folder: Path) -> None:
    """The page writes into it. Root gives it to the page's user as long as nothing is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0 and not any(folder.iterdir()):
        os.chown(folder, USER_ID, USER_ID)


def _can_be_written(folder: Path) -> bool:
    """By `USER_ID`, whose group has the same number."""
    there = folder.stat()
    shift = 6 if there.st_uid == USER_ID else 3 if there.st_gid == USER_ID else 0
    return there.st_mode >> shift & 0o3 == 0o3


def _as_text(value: object) -> str:
    """As an environment has it; empty for what isn't there, and for secrets."""
    if value is None or isinstance(value, SecretStr):
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _write_secrets(home: Home, secrets: Mapping[str, str]) -> dict[str, str]:
    """The folder is closed to others; the files aren't, for the user in the container is another one."""
    home.secrets.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.secrets.chmod(0o700)
    variables = {}
    for name, value in secrets.items():
        path = home.secrets / name.lower()
        path.write_text(value)
        path.chmod(0o644)
        variables[f"{name}_FILE"] = str(path)
    return variables


# --- The engine ---


def engine_answers() -> bool:
    """Whether there is a Docker engine to be used, and Compose with it."""
    if shutil.which("docker") is None:
        return False
    questions = (["docker", "info"], ["docker", "compose", "version"])
    try:
        return all(subprocess.run(q, capture_output=True, timeout=20, check=False).returncode == 0 for q in questions)
    except subprocess.TimeoutExpired:
        return False


class Containers:
    """The containers of a record: its `Runner`."""

    def __init__(self, record: Record) -> None:
        self._compose = record.compose
        self._containers = record.containers

    @classmethod
    def connect(cls, record: Record) -> Containers | None:
        """`None` where no container of the record is left, or no engine answers."""
        containers = cls(record)
        is_there = any(process.state != "UNKNOWN" for process in containers.processes().values())
        return containers if is_there else None

    def processes(self) -> dict[str, ProcessInfo]:
        """One that was removed behind our back is in the state UNKNOWN."""
        inspected = _run(["docker", "inspect", "--type", "container", *self._containers.values()])
        found = json.loads(inspected.stdout or "[]")
        states = {entry["Name"].removeprefix("/"): _process_info(entry["State"]) for entry in found}
        gone = ProcessInfo("UNKNOWN", 0, 0.0)
        return {name: states.get(container, gone) for name, container in self._containers.items()}

    def start(self, name: str) -> None:
        started = _run(["docker", "start", self._containers[name]])
        if started.returncode != 0:
            raise StackError(f"{name} could not be started: {started.stderr.strip()}")

    def stop(self, name: str) -> None:
        """Doesn't wait: the container has the grace period of its own before the engine kills it."""
        command = ["docker", "stop", self._containers[name]]
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def shut_down(self) -> None:
        """Removes containers and their network; volumes stay."""
        _run([*self._compose, "down"])

    def log_of_start(self, service: Service, log_size: int) -> list[str]:
        shown = _run(["docker", "logs", "--tail", str(LOG_LINES), self._containers[service.name]])
        return (shown.stdout + shown.stderr).splitlines()


def become_logs(record: Record, name: str, num_lines: int, follow: bool) -> NoReturn:
    """Becomes `docker logs` of a service; raises `StackError` naming those there are."""
    if record.service(name) is None:
        raise StackError(f"no log of {name!r}; there are {', '.join(service.name for service in record.services)}")
    options = ["--follow"] if follow else []
    os.execvp("docker", ["docker", "logs", "--tail", str(num_lines), *options, record.containers[name]])


def _process_info(state: Mapping[str, Any]) -> ProcessInfo:
    is_running = state["Status"] == "running"
    return ProcessInfo(
        state=SUPERVISOR_STATES.get(state["Status"], state["Status"].upper()),
        pid=state["Pid"] if is_running else 0,
        uptime_s=_seconds_since(state["StartedAt"]) if is_running else 0.0,
    )


def _seconds_since(moment: str) -> float:
    """Of the engine's time stamps, in UTC with nanoseconds."""
    began = datetime.datetime.fromisoformat(moment[:19] + "+00:00")
    return max(0.0, (datetime.datetime.now(datetime.UTC) - began).total_seconds())


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=CALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SupervisorGoneError(f"the Docker engine does not answer any more ({type(error).__name__})") from error
