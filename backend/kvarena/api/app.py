"""The HTTP application over an engine."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer
from prometheus_client.registry import Collector

from kvarena.api import about, chat, completions, tokenization
from kvarena.api.auth import ApiKeyCheck
from kvarena.api.config import ApiConfig
from kvarena.api.engine import Engine
from kvarena.api.errors import install_error_handlers
from kvarena.api.request_ids import RequestIds
from kvarena.api.server import Server


def create_app(
    engine: Engine,
    config: ApiConfig | None = None,
    *,
    routers: Iterable[APIRouter] = (),
    collectors: Iterable[Collector] = (),
) -> FastAPI:
    """`routers`: paths of the engine's own. They find the server in `app.state.server`; those that take a body use
    `route_class=JsonRoute`. `collectors`: figures of the engine's own, for `/metrics`. The engine stays its caller's,
    who closes it.
    """
    config = config or ApiConfig()
    app = FastAPI(
        title=f"KV Arena: {engine.contender}",
        version=version("kvarena"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = Server.of(engine, config)
    for collector in collectors:
        app.state.server.metrics.registry.register(collector)
    install_error_handlers(app)
    secured: list[Any] = []
    if config.api_key is not None:
        app.add_middleware(ApiKeyCheck, contender=engine.contender, api_keys=[config.api_key])
        secured = [Depends(HTTPBearer(auto_error=False))]  # For the OpenAPI document; the middleware checks.
    app.add_middleware(RequestIds)
    app.include_router(about.open_router)
    for router in (about.router, chat.router, completions.router, tokenization.router, *routers):
        app.include_router(router, dependencies=secured)
    return app
