"""Stands in for `docker` where there is no engine: notes what it was asked, and starts a small service per container.

    fake_docker.py FOLDER ARGUMENT ...

FOLDER has `ports.json`, container names with the port of each one's health address, and, where they shall die, `dies`
with the state that they are in then.
It keeps `calls.jsonl` there, a line of arguments and environment for each call, and `NAME.json`, a container's state.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

SMALL_SERVICE = Path(__file__).with_name("small_service.py")


def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    with (folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps({"arguments": arguments, "environment": dict(os.environ)}) + "\n")
    ports: dict[str, int] = json.loads((folder / "ports.json").read_text())
    match arguments:
        case ["compose", *words] if "--no-start" in words:
            for name in ports:
                write(folder, name, "created")
        case ["compose", *_, "down"]:
            for name in ports:
                end(folder, name)
                (folder / f"{name}.json").unlink(missing_ok=True)
        case ["start", name]:
            options = ["--healthy-after", "60", "--die-after", "1"] if (folder / "dies").exists() else []
            command = [sys.executable, str(SMALL_SERVICE), str(ports[name]), *options]
            with (folder / f"{name}.log").open("w") as log:
                started = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            write(folder, name, "running", started.pid)
        case ["stop", name]:
            end(folder, name)
            write(folder, name, "exited")
        case ["inspect", "--type", "container", *names]:
            there = [folder / f"{name}.json" for name in names if (folder / f"{name}.json").is_file()]
            print(json.dumps([look_at(path) for path in there]))
            sys.exit(len(there) < len(names))
        case ["logs", "--tail", _, *_, name]:
            print((folder / f"{name}.log").read_text(), file=sys.stderr)


def look_at(path: Path) -> dict[str, Any]:
    """A container's description; one whose process has ended is `exited`."""
    found: dict[str, Any] = json.loads(path.read_text())
    if found["State"]["Pid"] and not psutil.pid_exists(found["State"]["Pid"]):
        dies = path.parent / "dies"
        found["State"] |= {"Status": dies.read_text() if dies.exists() else "exited", "Pid": 0}
    return found


def write(folder: Path, name: str, status: str, pid: int = 0) -> None:
    began = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.123456789Z")
    state = {"Status": status, "Pid": pid, "StartedAt": began}
    (folder / f"{name}.json").write_text(json.dumps({"Name": f"/{name}", "State": state}))


def end(folder: Path, name: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        pid = json.loads((folder / f"{name}.json").read_text())["State"]["Pid"]
        if pid:
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
