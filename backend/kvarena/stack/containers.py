"""The stack in containers: whether it is wanted, and what `docker compose` is told of the settings.

`compose.yaml` is the list of containers, each of which takes its command from `services`. Here the settings become the
variables that it has, and its services the ones of the record, so that status, logs, restart, warm and down go on as
they do with processes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from kvarena.contenders.spec import ComposeProfile
from kvarena.stack import machine
from kvarena.stack.docker import Containers, container_name, create_containers, engine_answers
from kvarena.stack.home import Home
from kvarena.stack.plan import Plan, make_plan
from kvarena.stack.preflight import check_data_folder, check_ports, estimate_memory
from kvarena.stack.record import Record
from kvarena.stack.service import Service, StackError
from kvarena.stack.services import build_services
from kvarena.stack.settings import SPECS, Settings

SERVICE_ENDINGS: Mapping[ComposeProfile, str] = {"cpu": "", "gpu": "-gpu", "ai100": "-ai100"}
CARD_DEVICES = Path("/dev/accel")
GIB = 1 << 30
SPARE_BYTES = 2 * GIB


def are_wanted(settings: Settings) -> bool:
    """`RUN_IN` decides; auto is containers for GPUs and cards, asked for or there, where a Docker engine answers.

    Raises `StackError` where containers are asked for and none can be run.
    """
    if settings.run_in == "processes" and settings.profile != "ai100":
        return False
    profile = compose_profile(settings)
    if settings.run_in == "auto" and profile == "cpu":
        return False
    if engine_answers():
        return True
    if settings.run_in == "containers" or settings.profile == "ai100":
        raise StackError(
            f"RUN_IN is {settings.run_in} and PROFILE is {settings.profile}, and no Docker engine with Compose answers "
            "(docker info, docker compose version); start it, or take RUN_IN=processes with PROFILE cpu or gpu"
        )
    return False


def compose_profile(settings: Settings) -> ComposeProfile:
    """The one that was asked for, or what suits the machine."""
    if settings.profile != "auto":
        return settings.profile
    if machine.visible_gpus():
        return "gpu"
    return "ai100" if any(CARD_DEVICES.glob("accel*")) else "cpu"


@dataclass(frozen=True)
class Deployment:
    """What shall run, and what `docker compose` has to be told for it. Secrets are in neither."""

    record: Record
    compose_services: tuple[str, ...]
    environment: Mapping[str, str]

    def check(self, services: Sequence[Service]) -> None:
        check_data_folder(Path(self.record.data_dir))
        check_ports(services)

    def start(self, home: Home, record: Record, secrets: Mapping[str, str]) -> Containers:
        """Makes the containers. Secrets go into files that only this user can reach, and the containers are given."""
        environment = {**self.environment, **_write_secrets(home, secrets)}
        Path(environment["RESULTS_DIR"]).mkdir(parents=True, exist_ok=True)  # the engine would make it, for root
        create_containers(record.compose, self.compose_services, environment)
        return Containers(record)


def plan_deployment(settings: Settings, home: Home) -> Deployment:
    """Raises `StackError` for contenders that the profile doesn't have, and what `make_plan` raises."""
    profile = compose_profile(settings)
    settings = settings.model_copy(
        update={
            "profile": "gpu" if profile == "gpu" else "cpu",
            "contenders": _contenders(settings, profile),
        }
    )
    plan = make_plan(settings, home)
    services = tuple(_as_container(service) for service in build_services(plan, home))
    shares_gpu = profile == "gpu" and len(plan.gpus) < len(plan.contenders)
    files = ["compose.yaml", *(["compose.gpu-share.yaml"] if shares_gpu else [])]
    compose = ["docker", "compose", "--project-directory", str(plan.root)]
    compose += [word for name in files for word in ("--file", str(plan.root / name))]
    return Deployment(
        record=Record(
            services=services,
            run_folder="",
            data_dir=str(plan.data_dir),
            served_model=plan.model.served_name,
            has_api_key=bool(settings.api_key),
            notice=plan.notice,
            chunk_tokens=plan.chunk_tokens,
            tokenizer_place=plan.tokenizer_place if plan.model.is_local else "",  # the page's container has no hub
            compose=(*compose, *_profile_options(profile, plan.contenders)),
        ),
        compose_services=tuple(compose_service(service.name, profile) for service in services),
        environment=compose_environment(settings, plan) | (_card() if profile == "ai100" else {}),
    )


def compose_service(name: str, profile: ComposeProfile) -> str:
    """What `compose.yaml` calls a service: containers' names are shared by profiles, names there are not."""
    return "ai100-card" if (name, profile) == ("ai100", "ai100") else name + SERVICE_ENDINGS[profile]


def contenders_of(profile: ComposeProfile) -> tuple[str, ...]:
    """Those that the profile has, those that are off by default included."""
    return tuple(name for name, spec in SPECS.items() if profile in spec.container.profiles)


def optional_profile(name: str, profile: ComposeProfile) -> str:
    """The profile that a contender stands in which is off by default; empty for one that is in `profile` itself."""
    return compose_service(name, profile) if SPECS[name].container.is_optional else ""


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
    }
    if plan.model.is_local:
        folder = Path(plan.model.name)
        environment |= {"MODELS_DIR": str(folder.parent), "MODEL": f"backend/models/{folder.name}"}
    if plan.dtype is not None:
        environment["DTYPE"] = plan.dtype
    if settings.container_memory_gb is None and plan.profile == "cpu":
        environment["CONTAINER_MEMORY_GB"] = str(_memory_gb(plan))
    return environment


def _profile_options(profile: ComposeProfile, contenders: Sequence[str]) -> list[str]:
    optional = (optional_profile(name, profile) for name in contenders)
    return [word for name in (profile, *filter(None, optional)) for word in ("--profile", name)]


def _card() -> dict[str, str]:
    """The first card, and the group that may use it, unless the environment names others."""
    device = next(iter(sorted(CARD_DEVICES.glob("accel*"))), None)
    if device is None or "AI100_DEVICE" in os.environ:
        return {}
    return {"AI100_DEVICE": str(device), "AI100_DEVICE_GROUP": str(device.stat().st_gid)}


def _contenders(settings: Settings, profile: ComposeProfile) -> tuple[str, ...]:
    """Those that were asked for; of the default ones, those that the profile has."""
    there_are = contenders_of(profile)
    if "contenders" not in settings.model_fields_set:
        return tuple(name for name in settings.contenders if name in there_are) or there_are
    if missing := [name for name in settings.contenders if name not in there_are]:
        raise StackError(
            f"the profile {profile} has no contender {missing[0]} in containers; choose from {', '.join(there_are)}, "
            "or take RUN_IN=processes"
        )
    return settings.contenders


def _as_container(service: Service) -> Service:
    return dataclasses.replace(service, log_path=f"docker logs {container_name(service.name)}")


def _as_text(value: object) -> str:
    """As an environment has it; empty for what isn't there, and for secrets."""
    if value is None or isinstance(value, SecretStr):
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _memory_gb(plan: Plan) -> int:
    """What one server may take: as much as it is estimated to need alone, and some more."""
    alone = estimate_memory(dataclasses.replace(plan, contenders=plan.contenders[:1]))
    return max(8, -(-(alone.total_bytes + SPARE_BYTES) // GIB))


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
