"""supervisord, which keeps the services running: its XML-RPC interface, its configuration, and starting it.

One supervisord per instance, on a socket only this user can open. Its programs start `kvarena.stack.processes`; they
never start by themselves, are restarted when they crash, and are stopped with all their child processes.
`running_supervisor` says what runs an instance, which is a Docker engine where its services are containers.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

import psutil
from supervisor.xmlrpc import SupervisorTransport

from kvarena.home import INSTANCE_VARIABLE, Home, StackError
from kvarena.stack import logs
from kvarena.stack.containers import Containers
from kvarena.stack.record import Record, read_record
from kvarena.stack.service import ProcessInfo, Runner, Service, SupervisorGoneError

CALL_TIMEOUT_S = 60.0
"""Long, because it also writes the services' logs, and may wait for a busy disk."""
EXIT_TIMEOUT_S = 10.0
START_TIMEOUT_S = 20.0

DAEMON_SECTIONS = """\
[supervisord]
logfile=logs/supervisord.log
pidfile=supervisord.pid
childlogdir=logs
logfile_maxbytes=5MB
logfile_backups=1
[unix_http_server]
file={socket_path}
chmod=0600
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""

# A service that ends within `startsecs` is tried three times, then given up; later crashes always restart it.
PROGRAM_SECTION = """\
[program:{name}]
command="%(ENV_KVARENA_PYTHON)s" -m kvarena.stack.processes {name}
stdout_logfile=logs/{name}.log
stdout_logfile_maxbytes=20MB
stdout_logfile_backups=2
redirect_stderr=true
autostart=false
autorestart=true
startsecs=60
startretries=3
stopwaitsecs={stop_timeout_s:.0f}
stopasgroup=true
killasgroup=true
"""


class Supervisor:
    """A supervisord that answers; its calls raise `SupervisorGoneError` when it does so no more."""

    def __init__(self, socket_path: Path) -> None:
        transport = _Transport(serverurl=f"unix://{socket_path}")
        self._rpc: Any = xmlrpc.client.ServerProxy("http://localhost", transport=transport).supervisor
        self.pid: int = self._call("getPID")

    @classmethod
    def connect(cls, record: Record | None) -> Supervisor | None:
        """The running supervisord of a record; `None` when there is none, or none that answers."""
        if record is None or not record.socket_path.exists():
            return None
        try:
            return cls(record.socket_path)
        except SupervisorGoneError:
            return None

    def processes(self) -> dict[str, ProcessInfo]:
        return {
            info["name"]: ProcessInfo(
                state=info["statename"],
                pid=info["pid"],
                uptime_s=max(0.0, info["now"] - info["start"]) if info["pid"] else 0.0,
            )
            for info in self._call("getAllProcessInfo")
        }

    def start(self, name: str) -> None:
        with contextlib.suppress(xmlrpc.client.Fault):  # started already, or gone already
            self._call("startProcess", name, False)

    def stop(self, name: str) -> None:
        try:
            self._call("stopProcess", name, False)
        except xmlrpc.client.Fault as fault:
            if "NOT_RUNNING" not in fault.faultString:
                raise

    def log_of_start(self, service: Service, log_size: int) -> list[str]:
        return logs.read_start(service.log_path, log_size)

    def shut_down(self) -> None:
        """Ends supervisord, killing it if it doesn't, and waits until it is gone."""
        try:
            process = psutil.Process(self.pid)
            self._call("shutdown")
            process.wait(EXIT_TIMEOUT_S)
        except psutil.NoSuchProcess:
            return
        except (SupervisorGoneError, psutil.TimeoutExpired):
            os.kill(self.pid, signal.SIGKILL)

    def _call(self, method: str, *arguments: object) -> Any:
        """A `Fault` is an answer; everything else that goes wrong means that there is none."""
        try:
            return getattr(self._rpc, method)(*arguments)
        except xmlrpc.client.Fault:
            raise
        except (OSError, http.client.HTTPException, xmlrpc.client.Error, ExpatError) as error:
            raise SupervisorGoneError(f"supervisord does not answer any more ({type(error).__name__})") from error


def running_supervisor(home: Home) -> tuple[Record | None, Runner | None]:
    """What the instance's record says, and what runs it, if anything does: supervisord, or the Docker engine."""
    record = read_record(home)
    if record is not None and record.compose:
        return record, Containers.connect(record)
    return record, Supervisor.connect(record)


def required_supervisor(home: Home) -> tuple[Record, Runner]:
    """The same; raises `StackError` where nothing runs."""
    record, supervisor = running_supervisor(home)
    if record is None or supervisor is None:
        raise StackError("nothing is running; start the stack with ./run-server.sh")
    return record, supervisor


class _Transport(SupervisorTransport):  # type: ignore[misc]  # the library has no types
    """The library's transport over a Unix socket, with a time limit: a supervisord that hangs is as good as none."""

    def __init__(self, serverurl: str) -> None:
        super().__init__(None, None, serverurl)
        self._get_connection = lambda: _Connection(serverurl.removeprefix("unix://"))


class _Connection(http.client.HTTPConnection):
    def __init__(self, socket_path: str) -> None:
        super().__init__("localhost", timeout=CALL_TIMEOUT_S)
        self._socket_path = socket_path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._socket_path)


def daemon_config(home: Home, record: Record) -> str:
    """Its paths are relative to the home, where supervisord runs: it would expand and cut absolute ones that hold
    characters like % and #."""
    socket_path = record.socket_path
    if socket_path.is_relative_to(home.path):
        socket_path = socket_path.relative_to(home.path)
    sections = [DAEMON_SECTIONS.format(socket_path=socket_path)]
    if os.getuid() == 0:  # it warns of running as root unless told to
        sections.append("[supervisord]\nuser=root\n")
    sections += [
        PROGRAM_SECTION.format(name=service.name, stop_timeout_s=service.stop_timeout_s) for service in record.services
    ]
    return "".join(sections)


def start_supervisor(home: Home, record: Record, secrets: Mapping[str, str]) -> Supervisor:
    """Starts supervisord for the services of `record`, none of which is started yet.

    `secrets` are put into its environment, from where the services have them; they are written nowhere.
    """
    home.daemon_config.write_text(daemon_config(home, record))
    environment = {
        **os.environ,
        **secrets,
        INSTANCE_VARIABLE: str(home.path),
        "KVARENA_HOME": str(home.path),
        "KVARENA_PYTHON": sys.executable,
        "TMPDIR": record.run_folder,  # vLLM leaves sockets and files there
    }
    started = subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(home.daemon_config)],
        cwd=home.path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    if started.returncode != 0:
        raise StackError(f"supervisord did not start:\n{(started.stdout + started.stderr).strip()}")
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if (supervisor := Supervisor.connect(record)) is not None:
            return supervisor
        time.sleep(0.1)
    raise StackError(f"supervisord does not answer; see {home.log('supervisord')}")
