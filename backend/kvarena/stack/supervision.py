"""The running supervisord of an instance, through its XML-RPC interface: asked, and told to start and stop services.

Every call returns soon: waiting is the caller's business. Starting supervisord itself is `supervisord`'s.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import xmlrpc.client
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

import psutil
from supervisor.xmlrpc import SupervisorTransport

from kvarena.stack import logs
from kvarena.stack.docker import Containers
from kvarena.stack.home import Home
from kvarena.stack.record import Record, read_record
from kvarena.stack.runner import ProcessInfo, Runner, SupervisorGoneError
from kvarena.stack.service import Service

CALL_TIMEOUT_S = 60.0
"""Long, for it writes the services' logs and may wait for a busy disk; what it is asked takes it no time."""
EXIT_TIMEOUT_S = 10.0


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
