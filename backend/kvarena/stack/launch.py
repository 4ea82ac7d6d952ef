"""Becomes one service: `python -m kvarena.stack.launch NAME`, run by the supervisor.

Commands and environments are taken from the record, not from the supervisor's configuration, whose quoting rules
can't carry every path and separator. The process id stays the same, so the supervisor watches the service itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

from kvarena.stack.home import Home
from kvarena.stack.logs import START_MARK
from kvarena.stack.record import read_record
from kvarena.stack.service import Service

NICENESS = 5
GROUP_NICENESS = "5"


def main() -> None:
    (name,) = sys.argv[1:]
    record = read_record(Home.find())
    service = record.service(name) if record else None
    if service is None:
        sys.exit(f"no service {name!r} is recorded in {Home.find().record}")
    become(service)


def become(service: Service) -> NoReturn:
    """Replaces this process by the service's, on its cores, in its folder and with its environment."""
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
