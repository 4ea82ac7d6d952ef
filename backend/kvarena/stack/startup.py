"""Starts services in the order they depend on each other, and waits until each is healthy.

A service that dies, or takes longer than its time, ends the wait with `ServiceFailedError` and the end of its log; what
to do with the others is the caller's decision.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvarena.stack.errors import ServiceFailedError
from kvarena.stack.health import probe
from kvarena.stack.logs import first_exception, size_of
from kvarena.stack.progress import Reporter
from kvarena.stack.runner import ProcessInfo, Runner
from kvarena.stack.service import Service

POLL_S = 0.5
LOG_LINES = 20


@dataclass(frozen=True)
class _Started:
    """What a service that is being waited for must stay: the same process, and in time."""

    pid: int
    deadline: float
    log_size: int


def start_and_wait(supervisor: Runner, services: Sequence[Service], reporter: Reporter) -> None:
    """Brings these services up; one that runs already is only waited for. Raises `ServiceFailedError`."""
    waiting = list(services)
    healthy: set[str] = set()
    started: dict[str, _Started] = {}
    names = {service.name for service in services}
    while waiting:
        processes = supervisor.processes()
        for service in list(waiting):
            reporter.update(service.name, "starting" if service.name in started else "waiting")
            if service.name not in started:
                if names.intersection(service.depends_on) <= healthy:
                    started[service.name] = _start(supervisor, service, processes)
                continue
            _check_alive(supervisor, service, started[service.name], processes[service.name], reporter)
            if probe(service) == "healthy":
                healthy.add(service.name)
                waiting.remove(service)
                reporter.update(service.name, "healthy")
        if waiting:
            time.sleep(POLL_S)


def _start(supervisor: Runner, service: Service, processes: Mapping[str, ProcessInfo]) -> _Started:
    log_size = size_of(service.log_path)
    if not processes[service.name].is_up:
        supervisor.start(service.name)
        processes = supervisor.processes()
    return _Started(
        pid=processes[service.name].pid,
        deadline=time.monotonic() + service.start_timeout_s,
        log_size=log_size,
    )


def _check_alive(supervisor: Runner, service: Service, start: _Started, now: ProcessInfo, reporter: Reporter) -> None:
    if now.pid != start.pid or not now.is_up:
        reason = "died while it was starting"
    elif time.monotonic() > start.deadline:
        reason = f"was not healthy within {service.start_timeout_s:.0f} s"
    else:
        return
    reporter.update(service.name, "failed")
    lines = supervisor.log_of_start(service, start.log_size)
    raise ServiceFailedError(
        service.name,
        reason,
        cause=first_exception(lines),
        log_tail="\n".join(lines[-LOG_LINES:]),
        log_path=service.log_path,
    )


def stop_and_wait(supervisor: Runner, services: Sequence[Service], reporter: Reporter) -> None:
    """Stops these services at once and waits until supervisord has seen each of them end."""
    running = list(services)
    for service in running:
        supervisor.stop(service.name)
    deadline = time.monotonic() + 2 * max((service.stop_timeout_s for service in running), default=0.0)
    while running and time.monotonic() < deadline:
        processes = supervisor.processes()
        for service in list(running):
            info = processes[service.name]
            if info.is_gone:
                running.remove(service)
            reporter.update(service.name, "stopped" if service not in running else "stopping")
        time.sleep(POLL_S / 2)
