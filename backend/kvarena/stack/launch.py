"""Becomes one service: `python -m kvarena.stack.launch NAME`, run by the supervisor.

Commands and environments are taken from the record, not from the supervisor's configuration, whose quoting rules
can't carry every path and separator. The process id stays the same, so the supervisor watches the service itself.
"""

from __future__ import annotations

import os
import sys

from kvarena.stack.home import Home
from kvarena.stack.logs import START_MARK
from kvarena.stack.record import read_record


def main() -> None:
    (name,) = sys.argv[1:]
    record = read_record(Home.find())
    service = record.service(name) if record else None
    if service is None:
        sys.exit(f"no service {name!r} is recorded in {Home.find().record}")
    if service.cpus:
        os.sched_setaffinity(0, service.cpus)
    os.chdir(service.directory)
    print(f"{START_MARK}{service.title}", flush=True)
    os.execvpe(service.command[0], service.command, {**os.environ, **service.environment})


if __name__ == "__main__":
    main()
