"""Becomes one service: `python -m kvarena.stack.launch NAME`, run by the supervisor.

Commands and environments are taken from the record, not from the supervisor's configuration, whose quoting rules
can't carry every path and separator. What the service's last life left running is ended first: it would keep memory
that the new one needs. The process id stays the same, so the supervisor watches the service itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

from kvarena.stack.home import SERVICE_VARIABLE, Home
from kvarena.stack.lmcache_l2 import adapter_of, prune
from kvarena.stack.logs import START_MARK
from kvarena.stack.processes import end, processes_of
from kvarena.stack.record import read_record
from kvarena.stack.service import Service

NICENESS = 5
GROUP_NICENESS = "5"


def main() -> None:
    (name,) = sys.argv[1:]
    home = Home.find()
    record = read_record(home)
    service = record.service(name) if record else None
    if service is None:
        sys.exit(f"no service {name!r} is recorded in {home.record}")
    if leftovers := processes_of(home, name):
        print(f"ending {len(leftovers)} processes that the last {name} left behind", flush=True)
        end(leftovers)
    os.environ[SERVICE_VARIABLE] = name
    become(service)


def become(service: Service) -> NoReturn:
    """Replaces this process by the service's, on its cores, in its folder and with its environment."""
    if (adapter := adapter_of(service.command)) and (freed := prune(adapter)):
        print(f"removed {freed / 2**20:.0f} MiB of chunks that were used least recently", flush=True)
    if service.cpus:
        os.sched_setaffinity(0, service.cpus)
        _yield_to_others()
    os.chdir(service.directory)
    print(f"{START_MARK}{service.title}", flush=True)
    os.execvpe(service.command[0], service.command, {**os.environ, **service.environment})


def _yield_to_others() -> None:
    """A vLLM server keeps its cores busy for as long as it answers; page and browser must not starve beside it.

    Where Linux schedules sessions as groups (autogroup), niceness only counts inside one, and the group has its own.
    """
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(GROUP_NICENESS)


if __name__ == "__main__":
    main()
