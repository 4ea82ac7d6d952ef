"""The processes of an instance, found by the marker in their environment and not by what a supervisor remembers.

Whatever way a supervisor or a server ended, `stop_leftovers` finds what it left behind and ends it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from kvarena.stack.home import INSTANCE_VARIABLE, SERVICE_VARIABLE, Home

TERMINATE_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 5.0
MAX_ROUNDS = 5
SHARED_MEMORY = Path("/dev/shm")


def processes_of(home: Home, service: str | None = None) -> list[psutil.Process]:
    """Every process of this user that carries the instance's marker, and the service's if one is named, but this one.

    A server that is killed leaves its children behind: they are still the service's.
    """
    marked = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.uids().real != os.getuid():
                continue
            environment = process.environ()
            is_asked_for = service in (None, environment.get(SERVICE_VARIABLE))
            if environment.get(INSTANCE_VARIABLE) == str(home.path) and is_asked_for:
                marked.append(process)
    return marked


def end(processes: Sequence[psutil.Process]) -> None:
    """Politely first."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=TERMINATE_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=KILL_TIMEOUT_S)


def stop_leftovers(home: Home) -> list[int]:
    """Ends every process of the instance, politely first, and removes its shared memory. Returns their ids."""
    stopped: dict[int, None] = {}
    for _ in range(MAX_ROUNDS):
        found = processes_of(home)
        if not found:
            break
        stopped |= dict.fromkeys(process.pid for process in found)
        end(found)
    remove_shared_memory(home)
    return list(stopped)


def remove_shared_memory(home: Home) -> None:
    """A server that was killed can't remove its segment."""
    for segment in SHARED_MEMORY.glob(f"*{home.shm_name}*"):
        with contextlib.suppress(OSError):
            segment.unlink()


def listener_of(port: int) -> str:
    """Which process listens on a port, for a message; empty when the system doesn't tell."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            address = connection.laddr
            is_listener = connection.status == psutil.CONN_LISTEN and address and address.port == port
            if is_listener and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""
