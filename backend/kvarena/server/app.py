"""The HTTP application over an engine, and serving it with uvicorn until it is told to end.

On SIGTERM or SIGINT all running generations are closed first, so that no client delays the shutdown.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer
from prometheus_client.registry import Collector

from kvarena.engines.base import Engine
from kvarena.server.errors import install_error_handlers
from kvarena.server.log import write_to_standard_output
from kvarena.server.middleware import (
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    LogLinesMiddleware,
    RequestIdMiddleware,
    max_body_bytes,
)
from kvarena.server.routes import chat_router, completions_router, info_router, open_router, tokenization_router
from kvarena.server.state import ApiConfig, Server


def create_app(
    engine: Engine,
    config: ApiConfig | None = None,
    *,
    routers: Iterable[APIRouter] = (),
    collectors: Iterable[Collector] = (),
) -> FastAPI:
    """`routers`: the engine's own paths. They find the server in `app.state.server`; those that take a body use
    `route_class=JsonRoute`. `collectors`: the engine's own figures for `/metrics`. The caller closes the
    engine.
    """
    config = config or ApiConfig()
    app = FastAPI(
        title=f"KV Arena: {engine.contender}",
        version=version("kvarena"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = Server(engine, config)
    for collector in collectors:
        app.state.server.metrics.registry.register(collector)
    install_error_handlers(app)
    max_bytes = max_body_bytes(engine.max_model_len)
    app.add_middleware(BodyLimitMiddleware, contender=engine.contender, max_bytes=max_bytes)
    app.add_middleware(LogLinesMiddleware)
    secured: list[Any] = []
    if config.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, contender=engine.contender, api_keys=[config.api_key])
        secured = [Depends(HTTPBearer(auto_error=False))]  # For the OpenAPI document; the middleware checks.
    app.add_middleware(RequestIdMiddleware)
    app.include_router(open_router)
    for router in (info_router, chat_router, completions_router, tokenization_router, *routers):
        app.include_router(router, dependencies=secured)
    return app


_SHUTDOWN_S = 5
_LOG_FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"


def serve(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Returns, or ends the process, after SIGTERM or SIGINT; the engine is closed then. Port 0 takes a free one, which
    the log names. Logs to standard output: a line of JSON for each request, and, unless logging is set up already, all
    else.
    """
    write_to_standard_output()
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, stream=sys.stdout)
    HttpServer(app, host, port).run()


class HttpServer(uvicorn.Server):
    """Differs from uvicorn's: generations are closed before it waits for connections, and the engine after."""

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> None:
        settings = uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=_SHUTDOWN_S,
            server_header=False,
        )
        super().__init__(settings)
        self._server: Server = app.state.server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.runner.close()
        try:
            await super().shutdown(sockets)
            await self._server.runner.join(_SHUTDOWN_S)
        finally:
            self._server.engine.close()
