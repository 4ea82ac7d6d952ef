"""vLLM's own API server with the blend, as a process: the API server is one, the engine another.

Both are forks of a process that has imported vLLM (`support/forks.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import psutil

from kvarena.contenders.servers import WORKER_IN_ENGINE
from kvarena.engines.vllm.config import BlendConfig, kv_transfer_config
from support.forks import ENVIRONMENT, become_service, fork_context
from support.lmcache_server import free_port


@contextmanager
def api_server(model: str, config: BlendConfig, log: Path, *options: str) -> Iterator[httpx.Client]:
    with ApiServer(model, config, log, *options) as server, server.client() as client:
        yield client


class ApiServer:
    """A context; it is healthy inside. `start` doesn't wait for that."""

    def __init__(self, model: str, config: BlendConfig, log: Path, *options: str) -> None:
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = ["--model", model, "--port", str(self.port)]
        self._command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny"]
        self._command += ["--distributed-executor-backend", WORKER_IN_ENGINE]
        self._command += ["--kv-transfer-config", kv_transfer_config(config)]
        self._command += ["--middleware", "kvarena.engines.vllm.middleware.KVArenaMiddleware", *options]
        self._process: BaseProcess | None = None

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def start(self) -> None:
        environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self._process = fork_context().Process(target=_serve, args=(self._command, self.log, environment))
        self._process.start()

    def wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 300
        with self.client() as client:
            while True:
                assert self._process.is_alive(), self.log.read_text()[-3000:]
                assert time.monotonic() < deadline, self.log.read_text()[-3000:]
                try:
                    client.get("/health").raise_for_status()
                    return
                except httpx.HTTPError:
                    time.sleep(0.2)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join(30)
            self._process.kill()
            self._process.join()
            self._process = None

    def kill(self) -> None:
        """With its engine."""
        assert self._process is not None
        server = psutil.Process(self._process.pid)
        for process in (server, *server.children(recursive=True)):
            process.kill()

    def __enter__(self) -> ApiServer:
        self.start()
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _serve(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    become_service(log, environment)
    from vllm.v1.engine import utils

    # For CPUs vLLM wants engines to import all of it once more. Nothing runs in other threads here before.
    utils.get_mp_context = partial(multiprocessing.get_context, "fork")
    sys.argv = ["vllm", *command]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
