"""What a service of the stack is, as plain data; the contract of what keeps services running; and how they fail.

`services` makes the list of services. Runners are supervisord for processes (`supervisord`) and a Docker engine for
containers (`containers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from kvarena.home import StackError


class ServiceFailedError(StackError):
    """A service died or wasn't healthy in time while it was started; carries the end of its log, and the first
    exception there, which is often the cause of the last."""

    def __init__(self, name: str, reason: str, *, cause: str, log_tail: str, log_path: str) -> None:
        super().__init__(f"{name} {reason}{f': {cause}' if cause else ''}")
        self.name = name
        self.log_tail = log_tail
        self.log_path = log_path


HOST = "127.0.0.1"


@dataclass(frozen=True)
class Network:
    """How services find each other. `listen`: the address a server listens on. `by_name`: others reach a service at
    its own name, as containers do; otherwise at `HOST`."""

    listen: str = HOST
    by_name: bool = False

    def host(self, name: str) -> str:
        return name if self.by_name else HOST


LOOPBACK = Network()
BETWEEN_CONTAINERS = Network(listen="0.0.0.0", by_name=True)


@dataclass(frozen=True)
class Service:
    """One process of the stack. Plain data: `dataclasses.asdict` is what the record and other runners keep.

    `address` is where its users reach it, `health_url` where its own machine does. `environment` is added to the
    starter's own; no secret stands in it (`HF_TOKEN` comes with the starter's environment). `depends_on` names the
    services that must be healthy before this one is started. `cpus` are the logical CPUs all its threads stay on;
    empty: any. Times are in seconds.
    """

    name: str
    title: str
    command: tuple[str, ...]
    port: int
    address: str
    health_url: str
    log_path: str
    environment: Mapping[str, str]
    directory: str
    other_ports: tuple[int, ...] = ()
    depends_on: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0


class SupervisorGoneError(StackError):
    """What keeps the services running ended, or hangs."""


@dataclass(frozen=True)
class ProcessInfo:
    """A service as its runner sees it. `state` is supervisord's name for it: STARTING, RUNNING, BACKOFF, FATAL, ..."""

    state: str
    pid: int
    uptime_s: float

    @property
    def is_up(self) -> bool:
        return self.state in ("STARTING", "RUNNING")

    @property
    def is_gone(self) -> bool:
        """It has no process and will get none by itself."""
        return self.state in ("STOPPED", "EXITED", "FATAL", "UNKNOWN")


class Runner(Protocol):
    """Every call returns soon; waiting is its caller's. Without an answer it raises `SupervisorGoneError`."""

    def processes(self) -> dict[str, ProcessInfo]:
        """Every service of the instance, by its name."""

    def start(self, name: str) -> None:
        """Starts a service that is not running. Whether it lives is seen in `processes`."""

    def stop(self, name: str) -> None:
        """Tells a service to stop; one that isn't running is left alone."""

    def log_of_start(self, service: Service, log_size: int) -> list[str]:
        """The lines that a service has logged since it was started, when its log had this size in bytes."""

    def shut_down(self) -> None:
        """Ends the runner itself, and what it has of the services."""
