"""What runs, and how it is: the supervisor's word on each process together with the service's own health."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvarena.home import Home, short_path
from kvarena.stack.chunk_cache import OnDisk, on_disk
from kvarena.stack.health import Health, probe
from kvarena.stack.processes import processes_of
from kvarena.stack.service import ProcessInfo, Service
from kvarena.stack.supervisord import running_supervisor

EXIT_HEALTHY, EXIT_UNHEALTHY, EXIT_NOTHING_RUNS = 0, 1, 3
STATES_OF_SUPERVISOR = {
    "STOPPED": "stopped",
    "STOPPING": "stopping",
    "EXITED": "exited",
    "BACKOFF": "restarting",
    "FATAL": "failed",
}
STATE_STYLES = {"healthy": "green", "starting": "yellow", "restarting": "yellow", "stopping": "yellow"}


@dataclass(frozen=True)
class ServiceStatus:
    """`state` is healthy, starting, not answering, restarting, stopping, stopped, exited or failed.
    `pid` and `uptime_s` are 0 without a process."""

    name: str
    title: str
    state: str
    address: str
    pid: int
    uptime_s: float
    log: str


@dataclass(frozen=True)
class StackStatus:
    instance: str
    services: tuple[ServiceStatus, ...]
    model: str = ""
    notice: str = ""
    on_disk: OnDisk | None = None
    num_unsupervised: int = 0

    @property
    def exit_code(self) -> int:
        if not self.services and not self.num_unsupervised:
            return EXIT_NOTHING_RUNS
        healthy = all(service.state == "healthy" for service in self.services)
        return EXIT_HEALTHY if healthy and not self.num_unsupervised else EXIT_UNHEALTHY

    def to_json(self) -> dict[str, Any]:
        return {
            "instance": self.instance,
            "running": bool(self.services),
            "healthy": self.exit_code == EXIT_HEALTHY,
            "num_unsupervised_processes": self.num_unsupervised,
            "model": self.model,
            "notice": self.notice,
            "chunks_on_disk": asdict(self.on_disk) if self.on_disk else None,
            "services": [asdict(service) for service in self.services],
        }


def stack_status(home: Home) -> StackStatus:
    """Asks supervisord and every service; changes nothing. Leftovers of a killed supervisor are counted."""
    record, supervisor = running_supervisor(home)
    if record is None or supervisor is None:
        return StackStatus(str(home.path), (), num_unsupervised=len(processes_of(home)))
    processes = supervisor.processes()
    with ThreadPoolExecutor(max_workers=len(record.services)) as pool:
        answers = list(pool.map(probe, record.services))
    services = []
    for service, health in zip(record.services, answers, strict=True):
        process = processes[service.name]
        services.append(
            ServiceStatus(
                name=service.name,
                title=service.title,
                state=_state(service, process, health),
                address=service.address,
                pid=process.pid,
                uptime_s=round(process.uptime_s, 1),
                log=service.log_path,
            )
        )
    return StackStatus(str(home.path), tuple(services), record.served_model, record.notice, on_disk(record))


def _state(service: Service, process: ProcessInfo, health: Health) -> str:
    if not process.is_up:
        return STATES_OF_SUPERVISOR.get(process.state, process.state.lower())
    if health == "not ready" and process.uptime_s < service.start_timeout_s:
        return "starting"
    return "healthy" if health == "healthy" else "not answering"


def show_status(status: StackStatus, console: Console) -> None:
    if status.num_unsupervised:
        console.print(
            f"{status.num_unsupervised} processes are running without their supervisor, which was killed; "
            "./run-server.sh stop ends them."
        )
    elif not status.services:
        console.print("Nothing is running; start the stack with ./run-server.sh.")
    else:
        console.print(_table(status))
        console.print(f"Model: {status.model}", highlight=False)
        if status.on_disk:
            console.print(
                f"{status.on_disk.as_text()}; ./run-server.sh clear empties it", highlight=False, soft_wrap=True
            )
        if status.notice:
            console.print(f"[yellow]{escape(status.notice)}[/]", soft_wrap=True)


def _table(status: StackStatus) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("service", "address", "state", "uptime", "log"):
        table.add_column(column, no_wrap=column != "log", overflow="fold")
    for service in status.services:
        table.add_row(
            service.name,
            service.address,
            f"[{STATE_STYLES.get(service.state, 'red')}]{service.state}[/]",
            _duration(service.uptime_s) if service.pid else "-",
            escape(short_path(service.log)),
        )
    return table


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{int(seconds)} s"
