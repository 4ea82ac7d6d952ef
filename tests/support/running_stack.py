"""A stack that was started through the command line, as tests see it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from kvarena.client import bearer
from kvarena.home import Home
from kvarena.stack.record import read_record
from kvarena.stack.service import Service
from kvarena.stack.settings import PORT_OFFSETS

KVARENA = Path(sys.executable).with_name("kvarena")
UP_TIMEOUT_S = 900


API_KEY = "sesame-of-the-tests"


@dataclass(frozen=True)
class Stack:
    """`api_key`: what its servers ask for, where they do. Unless it `compiles`, vLLM finds no compiler, and compiles
    nothing: that takes longer than the rest of its start.
    """

    home: Path
    api_key: str = ""
    compiles: bool = False

    @property
    def environment(self) -> dict[str, str]:
        return {
            "LMCACHE_L2": "none",
            "LMCACHE_TIMEOUT_S": "10",
            "KVARENA_RESULTS_DIR": str(self.home / "results"),
            **os.environ,
            **({} if self.compiles else {"CXX": "none"}),
            "KVARENA_HOME": str(self.home),
            "KVARENA_API_KEY": self.api_key,
        }

    def command(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [KVARENA, *arguments], env=self.environment, text=True, capture_output=True, timeout=timeout_s
        )

    def service(self, name: str) -> dict[str, Any]:
        status = json.loads(self.command("status", "--json").stdout)
        return next(service for service in status["services"] if service["name"] == name)

    def recorded(self, name: str) -> Service:
        """As it was started; without asking it how it is, which takes `status` a second."""
        record = read_record(Home(self.home))
        service = record.service(name) if record else None
        assert service, name
        return service

    def address(self, name: str) -> str:
        return self.recorded(name).address

    def client(self, name: str) -> httpx.Client:
        return httpx.Client(base_url=self.address(name), headers=bearer(self.api_key), timeout=120, trust_env=False)

    def num_running_requests(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.address(name)}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


@contextmanager
def started(home: Path, *arguments: str, compiles: bool = False) -> Iterator[Stack]:
    """As a user starts and stops it: `kvarena up` with these arguments, on free ports, with an API key."""
    stack = Stack(home, API_KEY, compiles)
    try:
        up = stack.command(
            "up", "--model", "town", "--port-base", str(free_port_base()), *arguments, timeout_s=UP_TIMEOUT_S
        )
        assert up.returncode == 0, up.stdout + up.stderr
        yield stack
    finally:
        stack.command("down")


def free_port_base() -> int:
    """Not one that a worker beside this one finds too: a stack takes a while to bind what was free."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for base in range(23000 + 3500 * (worker % 8), 60000, 700):
        if all(_is_free(base + offset) for offset in PORT_OFFSETS.values()):
            return base
    raise AssertionError("no free ports for a stack")


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
