"""vLLM's own API server with the blend, as a process: the API server is one, the engine another."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from kvarena.contenders.servers import WORKER_IN_ENGINE
from kvarena.engines.vllm.config import BlendConfig, kv_transfer_config
from support.forks import ENVIRONMENT
from support.lmcache_server import free_port


@contextmanager
def api_server(model: str, config: BlendConfig, log: Path, *options: str) -> Iterator[httpx.Client]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny"]
    command += ["--distributed-executor-backend", WORKER_IN_ENGINE]
    command += ["--kv-transfer-config", kv_transfer_config(config)]
    command += ["--middleware", "kvarena.engines.vllm.middleware.KVArenaMiddleware", *options]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            _wait_for_health(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _wait_for_health(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            client.get("/health").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.5)
