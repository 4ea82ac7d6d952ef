"""supervisord, which keeps the services running: its configuration, and starting it.

One supervisord per instance, on a socket only this user can open. Its programs start `kvarena.stack.launch`; they
never start by themselves, come back when they crash, and are stopped with all their child processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping

from kvarena.stack.errors import StackError
from kvarena.stack.home import INSTANCE_VARIABLE, Home
from kvarena.stack.record import Record
from kvarena.stack.supervision import Supervisor

START_TIMEOUT_S = 20.0
LOG_BYTES = "20MB"
SETTLE_S = 60
"""A service that ends sooner than this after its start is tried three times, then given up; later crashes always
restart it."""

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

PROGRAM_SECTION = """\
[program:{name}]
command="%(ENV_KVARENA_PYTHON)s" -m kvarena.stack.launch {name}
stdout_logfile=logs/{name}.log
stdout_logfile_maxbytes={log_bytes}
stdout_logfile_backups=2
redirect_stderr=true
autostart=false
autorestart=true
startsecs={settle_s}
startretries=3
stopwaitsecs={stop_timeout_s:.0f}
stopasgroup=true
killasgroup=true
"""


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
        PROGRAM_SECTION.format(
            name=service.name,
            log_bytes=LOG_BYTES,
            settle_s=SETTLE_S,
            stop_timeout_s=service.stop_timeout_s,
        )
        for service in record.services
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
    return _wait_for_socket(home, record)


def _wait_for_socket(home: Home, record: Record) -> Supervisor:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if (supervisor := Supervisor.connect(record)) is not None:
            return supervisor
        time.sleep(0.1)
    raise StackError(f"supervisord does not answer; see {home.log('supervisord')}")
