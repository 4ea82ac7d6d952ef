"""The processes of an instance: becoming a service, and finding and ending what services have left behind.

They are found by a marker in their environment, not by what a supervisor remembers, so `stop_leftovers` finds them
however their supervisor or server ended.

`python -m kvarena.stack.processes NAME`, run by the supervisor, becomes one service under the same process id. Command
and environment come from the record: the supervisor's configuration can't quote every path and separator. What the
service's last run left behind is ended first, because it would keep memory that the new one needs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psutil

from kvarena.home import INSTANCE_VARIABLE, SERVICE_VARIABLE, Home
from kvarena.stack.lmcache_l2 import adapter_of, prune
from kvarena.stack.logs import START_MARK
from kvarena.stack.record import read_record
from kvarena.stack.service import Service

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


def end_processes(home: Home, processes: Sequence[psutil.Process]) -> None:
    """Politely first."""
    with shared_memory_freed(home, processes):
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
        end_processes(home, found)
    for segment in SHARED_MEMORY.glob(f"*{home.shm_name}*"):  # a server that was killed can't remove its own
        with contextlib.suppress(OSError):
            segment.unlink()
    return list(stopped)


@contextmanager
def shared_memory_freed(home: Home, processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Removes the segments that these processes use, and at the end nobody does: vLLM names them at random, and those
    of a process that is killed stay. LMCache's has the instance's name, and is found by it.
    """
    before = _shared_memory_of(processes)
    try:
        yield
    finally:
        for segment in before - _shared_memory_of(psutil.process_iter()) if before else ():
            if home.shm_name not in segment.name:
                with contextlib.suppress(OSError):
                    segment.unlink()


def _shared_memory_of(processes: Iterable[psutil.Process]) -> set[Path]:
    found: set[Path] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text(errors="surrogateescape").splitlines()
            found |= {Path(line[line.index("/") :]) for line in lines if f" {SHARED_MEMORY}/" in line}
    return found


def listener_of(port: int) -> str:
    """Which process listens on a port, for a message; empty when the system doesn't tell."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            address = connection.laddr
            is_listener = connection.status == psutil.CONN_LISTEN and address and address.port == port
            if is_listener and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""


NICENESS = 5


def main() -> None:
    (name,) = sys.argv[1:]
    home = Home.find()
    record = read_record(home)
    service = record.service(name) if record else None
    if service is None:
        sys.exit(f"no service {name!r} is recorded in {home.record}")
    if leftovers := processes_of(home, name):
        print(f"ending {len(leftovers)} processes that the last {name} left behind", flush=True)
        end_processes(home, leftovers)
    os.environ[SERVICE_VARIABLE] = name
    become(service)


def become(service: Service) -> NoReturn:
    """Replaces this process by the service's, on its cores, in its folder and with its environment."""
    if (adapter := adapter_of(service.command)) and (freed := prune(adapter)):
        print(f"removed {freed / 2**20:.0f} MiB of chunks that were used least recently", flush=True)
    if service.cpus:
        os.sched_setaffinity(0, service.cpus)
        # A vLLM server keeps its cores busy for as long as it answers; page and browser must not starve beside it.
        # Where Linux schedules sessions as groups (autogroup), niceness only counts inside one; the group has its own.
        os.nice(NICENESS)
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICENESS))
    os.chdir(service.directory)
    print(f"{START_MARK}{service.title}", flush=True)
    os.execvpe(service.command[0], service.command, {**os.environ, **service.environment})


if __name__ == "__main__":
    main()
