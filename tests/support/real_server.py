"""A real server over an engine, on a free port, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx
from fastapi import APIRouter
from prometheus_client.registry import Collector

from kvarena.engines.base import Engine
from kvarena.server.app import HttpServer, create_app
from kvarena.server.state import ApiConfig

E = TypeVar("E", bound=Engine)


@dataclass
class RealServer(Generic[E]):
    engine: E
    server: HttpServer
    url: str

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, verify=False, **settings)


@contextmanager
def serving(
    engine: E,
    config: ApiConfig | None = None,
    routers: Iterable[APIRouter] = (),
    collectors: Iterable[Collector] = (),
) -> Iterator[RealServer[E]]:
    """Listens when the block begins. The engine is closed with the server."""
    server = HttpServer(create_app(engine, config, routers=routers, collectors=collectors))
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:  # Named, for else asyncio leaves Nagle's algorithm on.
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server ended before it listened"
                time.sleep(0.002)
            yield RealServer(engine, server, url)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
