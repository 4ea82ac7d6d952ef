"""Two vLLMs with the blend over one LMCache with a second tier on disk, and routers in front of both."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from kvarena.engines.vllm.config import BlendConfig
from kvarena.stack.lmcache_l2 import l2_adapter
from support.lmcache_server import LMCacheServer, free_port
from support.vllm_server import ApiServer

ROUTER = Path(sys.executable).with_name("vllm-router")
STACK_ROUTER = os.environ.get("PRODUCTION_STACK_ROUTER", "").split()
"""That of the production stack, which isn't on PyPI, in place of the vLLM project's newer one."""
STACK_LOGIC = {"consistent_hash": "session", "cache_aware": "prefixaware"}


@dataclass(frozen=True)
class Fleet:
    """`by_session` and `by_prefix` are routers in front of the same servers."""

    model: str
    servers: tuple[ApiServer, ApiServer]
    by_session: httpx.Client
    by_prefix: httpx.Client

    def who_answered(self, answer: dict[str, Any]) -> int:
        """The one that has its report."""
        (found,) = [number for number, server in enumerate(self.servers) if has_report(server, answer)]
        return found


def has_report(server: ApiServer, answer: dict[str, Any]) -> bool:
    try:
        return httpx.get(f"{server.url}/kvarena/requests/{answer['id']}").is_success
    except httpx.ConnectError:
        return False


@contextmanager
def open_fleet(model: str, folder: Path, separator: str, *options: str) -> Iterator[Fleet]:
    """`options` are those of both vLLMs."""
    with ExitStack() as stack:
        (folder / "chunks").mkdir()
        tier = l2_adapter(str(folder / "chunks"), 1.0, folder)
        store = stack.enter_context(LMCacheServer(folder, tier))
        servers = []
        for name in ("one", "other"):
            config = BlendConfig(
                separator=separator,
                lmcache_url=store.url,
                lmcache_http_url=store.http_url,
                lmcache_timeout_s=5.0,
                index_path=str(folder / f"{name}.sqlite"),
            )
            server = ApiServer(model, config, folder / f"{name}.log", "--enable-prompt-tokens-details", *options)
            stack.callback(server.stop)
            server.start()
            servers.append(server)
        for server in servers:
            server.wait()
        by_session, by_prefix = [
            stack.enter_context(_router(servers, policy, folder)) for policy in ("consistent_hash", "cache_aware")
        ]
        yield Fleet(model, (servers[0], servers[1]), by_session, by_prefix)


@contextmanager
def _router(servers: list[ApiServer], policy: str, folder: Path) -> Iterator[httpx.Client]:
    port, log = free_port(), folder / f"{policy}.log"
    urls = [server.url for server in servers]
    if STACK_ROUTER:
        command = [*STACK_ROUTER, "--service-discovery", "static", "--static-backends", ",".join(urls)]
        command += ["--static-models", "tiny,tiny", "--routing-logic", STACK_LOGIC[policy]]
        command += ["--session-key", "x-session-id", "--max-instance-failover-reroute-attempts", "1"]
    else:
        command = [str(ROUTER), "--worker-urls", *urls, "--policy", policy, "--prometheus-port", str(free_port())]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                deadline = time.monotonic() + 60
                while not _is_healthy(client):
                    assert process.poll() is None, log.read_text()[-3000:]
                    assert time.monotonic() < deadline, log.read_text()[-3000:]
                    time.sleep(0.1)
                yield client
        finally:
            process.terminate()


def _is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").is_success
    except httpx.HTTPError:
        return False
