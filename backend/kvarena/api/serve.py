"""Serves an engine over uvicorn until it is told to end.

On SIGTERM or SIGINT all running generations are closed first, so that no client and no connection holds up the end.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterable

import uvicorn
from fastapi import APIRouter
from prometheus_client.registry import Collector

from kvarena.api import request_log
from kvarena.api.app import create_app
from kvarena.api.config import ApiConfig
from kvarena.api.engine import Engine
from kvarena.api.server import Server

_SHUTDOWN_S = 5
_LOG_FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"


def serve(
    engine: Engine,
    host: str = "127.0.0.1",
    port: int = 8000,
    config: ApiConfig | None = None,
    *,
    routers: Iterable[APIRouter] = (),
    collectors: Iterable[Collector] = (),
) -> None:
    """Returns, or ends the process, after SIGTERM or SIGINT; the engine is closed then. Port 0 takes a free one, which
    the log names. Logs to standard output: a line of JSON for each request, and, unless logging is set up already, all
    else.
    """
    request_log.write_to_standard_output()
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, stream=sys.stdout)
    make_server(engine, host, port, config, routers=routers, collectors=collectors).run()


def make_server(
    engine: Engine,
    host: str = "127.0.0.1",
    port: int = 8000,
    config: ApiConfig | None = None,
    *,
    routers: Iterable[APIRouter] = (),
    collectors: Iterable[Collector] = (),
) -> EngineServer:
    app = create_app(engine, config, routers=routers, collectors=collectors)
    settings = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=_SHUTDOWN_S,
        server_header=False,
    )
    return EngineServer(settings, app.state.server)


class EngineServer(uvicorn.Server):
    """uvicorn's, but that generations are closed before it waits for connections, and the engine after."""

    def __init__(self, settings: uvicorn.Config, server: Server) -> None:
        super().__init__(settings)
        self._server = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.runner.close()
        try:
            await super().shutdown(sockets)
            await self._server.runner.join(_SHUTDOWN_S)
        finally:
            self._server.engine.close()
