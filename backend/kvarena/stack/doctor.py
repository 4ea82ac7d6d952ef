"""What this machine has for the stack, what `up` would start on it, what can't run and why: `kvarena doctor`.

Facts come from `machine`; what is right and wrong, the checks say that `up` makes. Nothing is started.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.markup import escape

from ai100.runtimes import card
from kvarena.contenders.servers import GIB
from kvarena.home import Home, StackError
from kvarena.model import DEFAULT_CPU_MODEL
from kvarena.stack import containers, machine
from kvarena.stack.lifecycle import not_running
from kvarena.stack.plan import Plan, make_plan
from kvarena.stack.preflight import (
    Check,
    check_memory,
    check_model_type,
    check_packages,
    checks_before_start,
    estimate_memory,
    is_free,
)
from kvarena.stack.processes import SHARED_MEMORY, listener_of
from kvarena.stack.service import SupervisorGoneError
from kvarena.stack.services import build_services
from kvarena.stack.settings import SPECS, Settings
from kvarena.stack.supervisord import running_supervisor

HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Verdict:
    """`problem` is empty where there is none."""

    name: str
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """`facts` and `wanted` are lines by what they are about: of the machine, and of what `up` would start. `ports` says
    who has each, by name and number. `checks` are those of `up`; `contenders` says of each whether it could run alone.
    """

    facts: Mapping[str, str]
    gpus: tuple[machine.GPU, ...]
    versions: Mapping[str, str]
    ports: Mapping[str, str] = field(default_factory=dict)
    wanted: Mapping[str, str] = field(default_factory=dict)
    checks: tuple[Verdict, ...] = ()
    contenders: tuple[Verdict, ...] = ()

    @property
    def is_ready(self) -> bool:
        return not any(check.problem for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"ready": self.is_ready, **asdict(self)}


def diagnose(load: Callable[[], Settings], home: Home) -> Diagnosis:
    """Whatever is wrong, the settings included, is in the diagnosis."""
    gpus = tuple(machine.gpus())
    try:
        settings = load()
    except StackError as error:
        return Diagnosis(_facts(None, home), gpus, machine.versions(), checks=(Verdict("settings", str(error)),))
    try:
        wanted, checks = _what_up_does(settings, home)
    except StackError as error:
        wanted, checks = {}, (Verdict("plan", str(error)),)
    return Diagnosis(
        facts=_facts(settings, home),
        gpus=gpus,
        versions=machine.versions(),
        ports={
            f"{name} {port}": "free" if is_free(port) else listener_of(port) or "taken"
            for name, port in settings.ports.items()
        },
        wanted=wanted,
        checks=checks,
        contenders=_judge((name, partial(_check_alone, settings, home, name)) for name in SPECS),
    )


def _what_up_does(settings: Settings, home: Home) -> tuple[dict[str, str], tuple[Verdict, ...]]:
    """Of the services that don't run yet, as `up` has it."""
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    supervisor = running_supervisor(home)[1]
    if containers.are_wanted(settings):
        deployment = containers.plan_deployment(settings, home)
        missing = not_running(supervisor, deployment.record.services)
        return _as_lines(deployment.plan, "containers"), _judge(deployment.checks(missing, token))
    plan = make_plan(settings, home)
    missing = not_running(supervisor, build_services(plan, home))
    return _as_lines(plan, "processes"), _judge(checks_before_start(plan, missing, token))


def _as_lines(plan: Plan, kind: str) -> dict[str, str]:
    blend, need = plan.blend, estimate_memory(plan)
    lines = {
        "runs in": f"{kind}, profile {plan.profile}",
        "model": f"{plan.model.name}, in {plan.dtype or plan.model.dtype(plan.hf_home) or 'its own data type'}",
        "documents": str(plan.data_dir),
        "main memory": f"{need.total_bytes / GIB:.1f} GiB at most, {need.store_bytes / GIB:g} GiB of it for chunks",
    }
    for name in plan.contenders:
        launch = plan.launch_on_its_share(name)
        cores = ",".join(map(str, launch.omp_cpus))
        place = "the card" if name not in plan.sharing else f"GPU {launch.gpu}" if launch.gpu else f"cores {cores}"
        how = f"; {blend.policy}, ratio {blend.ratio:g}, by {plan.blend_engine}" if SPECS[name].has_chunk_cache else ""
        lines[name] = f"{place}, port {launch.port}{how}"
    if plan.notice:
        lines["notice"] = f"{DEFAULT_CPU_MODEL} is fetched first; {plan.model.served_name} is served if it can't be"
    return lines


def _check_alone(settings: Settings, home: Home, name: str) -> None:
    alone = settings.model_copy(update={"contenders": (name,), "ui": False})
    if containers.are_wanted(alone):
        plan = containers.plan_deployment(alone, home).plan
    else:
        plan = make_plan(alone, home)
        check_packages(plan)
        check_memory(estimate_memory(plan), machine.available_memory_bytes())
    check_model_type(SPECS[name], plan.model.name, plan.model.architecture(plan.hf_home))


def _judge(checks: Iterable[Check]) -> tuple[Verdict, ...]:
    return tuple(Verdict(name, _problem(check)) for name, check in checks)


def _problem(check: Callable[[], None]) -> str:
    try:
        check()
    except StackError as error:
        return str(error)
    return ""


def _running(home: Home) -> str:
    """What runs of the instance, as whatever keeps it running sees it."""
    try:
        record, runner = running_supervisor(home)
        services = runner.processes() if runner else {}
    except SupervisorGoneError as error:
        return f"doesn't answer: {error}"
    if not record or not services:
        return "doesn't run"
    states = ", ".join(
        f"{name} {'up' if service.is_up else service.state.lower()}" for name, service in services.items()
    )
    return f"{'containers' if record.compose else 'processes'}: {states}"


def _facts(settings: Settings | None, home: Home) -> dict[str, str]:
    memory = psutil.virtual_memory()
    lacking = "; ".join(card.missing())
    cards = ", ".join(map(str, machine.cards())) or "none"
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {_distribution()}",
        "processor": f"{machine.cpu_name()}: {' '.join(machine.instructions())}",
        "cores": str(len(machine.physical_cores())),
        "memory": f"{machine.available_memory_bytes() / GIB:.1f} of {memory.total / GIB:.1f} GiB available",
        "shared memory": f"{shutil.disk_usage(SHARED_MEMORY).free / GIB:.1f} GiB free in {SHARED_MEMORY}",
        "AI 100 cards": f"{cards}{f' (missing for it: {lacking})' if machine.cards() and lacking else ''}",
        "Docker": _engine(),
        "stack": _running(home),
        "C++ compiler": "yes"
        if machine.has_compiler()
        else "no: models aren't compiled, and blend has vLLM's kernels only",
        "hub": _hub(),
        "token": _token(settings),
    }


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return "unknown distribution"


def _engine() -> str:
    if containers.engine_answers():
        return "an engine answers, with Compose"
    return "the command is there, but no engine with Compose answers" if shutil.which("docker") else "none"


def _hub() -> str:
    from huggingface_hub.constants import ENDPOINT

    try:
        httpx.head(ENDPOINT, timeout=HUB_TIMEOUT_S)
    except httpx.HTTPError as error:
        return f"{ENDPOINT} can't be reached ({type(error).__name__})"
    return f"{ENDPOINT} answers"


def _token(settings: Settings | None) -> str:
    """Where it is from, and not what it is."""
    from huggingface_hub import get_token

    if settings is not None and settings.hf_token:
        return "HF_TOKEN"
    return "of the hub's own log-in" if get_token() else "none"


def show_diagnosis(found: Diagnosis, console: Console) -> None:
    gpus = {f"GPU {gpu.index}": _gpu_line(gpu) for gpu in found.gpus} or {"GPUs": "none that a driver shows"}
    sections = {
        "Machine": {**found.facts, **gpus},
        "Versions": found.versions,
        "Ports": found.ports,
        "./run-server.sh would start": found.wanted,
        "What it checks first": {check.name: check.problem or "ok" for check in found.checks},
        "Each contender alone": {each.name: each.problem or "can run" for each in found.contenders},
    }
    for title, lines in sections.items():
        if lines:
            console.print(f"[bold]{title}[/]")
        for name, text in lines.items():
            console.print(f"  {name:<20} {escape(text)}", highlight=False, soft_wrap=True)


def _gpu_line(gpu: machine.GPU) -> str:
    memory = "" if gpu.free_mib is None else f", {gpu.free_mib} of {gpu.total_mib} MiB free"
    return f"{gpu.name}{memory}, driver {gpu.driver}, compute capability {gpu.compute_capability}"
