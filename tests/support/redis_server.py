"""A real Redis or Valkey on a free port, for tests; they are skipped where neither is installed."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.lmcache_server import free_port


@dataclass(frozen=True)
class RedisServer:
    port: int
    password: str
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def num_keys(self) -> int:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            replies = connection.makefile("rb")
            if self.password:
                connection.sendall(f"AUTH {self.password}\r\n".encode())
                assert replies.readline() == b"+OK\r\n"
            connection.sendall(b"DBSIZE\r\n")
            return int(replies.readline().lstrip(b":"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextmanager
def running_redis(folder: Path, password: str = "") -> Iterator[RedisServer]:
    program = next((found for name in ("valkey-server", "redis-server") if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    port = free_port()
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
    command += ["--requirepass", password] if password else []
    with (folder / "redis.log").open("wb") as log:
        server = RedisServer(port, password, subprocess.Popen(command, stdout=log, stderr=log))
    try:
        _wait(server)
        yield server
    finally:
        server.kill()


def _wait(server: RedisServer) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            server.num_keys()
            return
        except OSError:
            assert time.monotonic() < deadline, "Redis does not answer"
            time.sleep(0.1)
