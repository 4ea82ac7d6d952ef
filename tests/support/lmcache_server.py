"""A real LMCache server on free ports, for tests."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from kvarena.stack.lmcache_l2 import CHUNK_FILES
from support.forks import ENVIRONMENT, become_service, fork_context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class LMCacheServer:
    """A context; `kill` and `start` may be called inside it. `l2` is its second tier, as `l2_adapter` makes it."""

    def __init__(
        self, folder: Path, l2: Mapping[str, Any] | None = None, *, l1_gb: float = 1.0, options: Sequence[str] = ()
    ) -> None:
        self.l1_gb = l1_gb
        self._options = options
        self._l2 = l2
        self.log = folder / "lmcache.log"
        self.port, self.http_port = free_port(), free_port()
        self.url = f"tcp://127.0.0.1:{self.port}"
        self.http_url = f"http://127.0.0.1:{self.http_port}"
        self._shm_name = f"kvarena_test_{uuid.uuid4().hex[:8]}"
        self._process: BaseProcess | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    def start(self) -> None:
        command = ["server", "--l1-size-gb", f"{self.l1_gb:g}"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--http-host", "127.0.0.1", "--http-port", str(self.http_port)]
        command += ["--eviction-policy", "LRU", "--chunk-size", "32"]
        command += ["--supported-transfer-mode", "auto", "--shm-name", self._shm_name, "--no-l1-use-lazy"]
        command += self._options
        if self._l2 is not None:
            command += ["--l2-adapter", json.dumps(self._l2), "--l2-prefetch-policy", "retain"]
        self._process = fork_context().Process(target=_serve, args=(command, self.log, os.environ | ENVIRONMENT))
        self._process.start()
        deadline = time.monotonic() + 120
        while not self._is_healthy():
            assert self._process.is_alive(), self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It runs no more, and its sockets stay open."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    @contextmanager
    def memory(self) -> Iterator[mmap.mmap]:
        """What it keeps, to be read and written; it doesn't notice."""
        with self.memory_path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            yield memory

    @property
    def memory_path(self) -> Path:
        return Path(f"/dev/shm/lmcache_l1_pool_{self._shm_name}")

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.http_url}/config", timeout=2, verify=False).is_success
        except httpx.HTTPError:
            return False

    def __enter__(self) -> LMCacheServer:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.kill()
        self.memory_path.unlink(missing_ok=True)


def _serve(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """`lmcache` with these words, in a process of its own."""
    become_service(log, environment)
    from lmcache.cli.main import main

    main(command)


def flip_bits(file: Path) -> None:
    """One in every byte."""
    content = np.memmap(file, np.uint8, "r+")
    content[:] = content ^ 1


def flip_files(folder: Path, http_url: str, number: int) -> None:
    """Of the second tier, once they are written; the first one has nothing any more."""
    deadline = time.monotonic() + 60
    while len(files := list(folder.rglob(CHUNK_FILES))) < number or len({path.stat().st_size for path in files}) > 1:
        assert time.monotonic() < deadline, len(files)
        time.sleep(0.2)
    for path in files:
        flip_bits(path)
    httpx.post(f"{http_url}/cache/clear").raise_for_status()
