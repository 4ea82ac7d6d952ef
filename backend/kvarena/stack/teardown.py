"""Ends an instance completely, whatever state it is in: services, supervisord, leftovers, sockets, shared memory."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from rich.console import Console

from kvarena.stack import progress
from kvarena.stack.home import Home
from kvarena.stack.processes import stop_leftovers
from kvarena.stack.record import Record
from kvarena.stack.runner import Runner, SupervisorGoneError
from kvarena.stack.startup import stop_and_wait
from kvarena.stack.supervision import running_supervisor


def stop_everything(home: Home, console: Console) -> tuple[list[str], list[int]]:
    """Returns the services it stopped, and the processes no supervisor answered for (any more)."""
    record, supervisor = running_supervisor(home)
    stopped: list[str] = []
    if record is not None and supervisor is not None:
        with contextlib.suppress(SupervisorGoneError):  # its services are leftovers now
            stopped = _stop_services(record, supervisor, console)
        supervisor.shut_down()
    leftovers = stop_leftovers(home)
    _remove_files(home, record)
    return stopped, leftovers


def _stop_services(record: Record, supervisor: Runner, console: Console) -> list[str]:
    processes = supervisor.processes()
    running = [service for service in record.services if not processes[service.name].is_gone]
    with progress.reporter(console, running) as reporter:
        stop_and_wait(supervisor, running, reporter)
    return [service.name for service in running]


def _remove_files(home: Home, record: Record | None) -> None:
    """Logs and caches stay."""
    shutil.rmtree(home.secrets, ignore_errors=True)
    home.remove_run_folder(Path(record.run_folder) if record is not None else home.usual_run_folder)
    for path in (home.record, home.daemon_config, home.path / "supervisord.pid"):
        path.unlink(missing_ok=True)
