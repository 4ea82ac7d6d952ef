"""The services as containers of a Docker engine: asked, started and stopped through the command `docker`.

The counterpart of `supervisord`. What a container is made of is in `compose.yaml`; its name is in the record. The
engine restarts what crashes.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from kvarena.home import StackError
from kvarena.stack.record import Record
from kvarena.stack.service import ProcessInfo, Service, SupervisorGoneError

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


def engine_answers() -> bool:
    """Whether there is a Docker engine to be used, and Compose with it."""
    if shutil.which("docker") is None:
        return False
    questions = (["docker", "info"], ["docker", "compose", "version"])
    try:
        return all(subprocess.run(q, capture_output=True, timeout=20, check=False).returncode == 0 for q in questions)
    except subprocess.TimeoutExpired:
        return False


def create_containers(compose: Sequence[str], compose_services: Sequence[str], environment: Mapping[str, str]) -> None:
    """Builds the images, with the engine's own progress on the terminal, and makes the containers without starting
    them. Raises `StackError`."""
    command = [*compose, "up", "--build", "--no-start", *compose_services]
    if subprocess.run(command, env={**os.environ, **environment}, check=False).returncode != 0:
        raise StackError("the containers could not be made; what docker compose says stands above")


class Containers:
    """The containers of a record."""

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
