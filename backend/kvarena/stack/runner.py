"""The contract of what keeps the services running: supervisord for processes, a Docker engine for containers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvarena.stack.errors import StackError
from kvarena.stack.service import Service


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
