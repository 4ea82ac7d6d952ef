"""What the routes of one server share, in `app.state.server`: settings, the engine, running generations, reports.

`ApiConfig` has the settings of the HTTP server itself. What the engine needs is the engine's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from kvarena.client import API_KEY_VARIABLE
from kvarena.engines.base import Engine, ReportLog
from kvarena.server.errors import ApiError, shown
from kvarena.server.metrics import Metrics
from kvarena.server.protocol import MAX_SAMPLES, ErrorAnswer
from kvarena.server.runner import Runner
from kvarena.server.text import TokenTexts


@dataclass(frozen=True)
class ApiConfig:
    """`api_key` None lets everybody in. Of all generations `max_running` run at once, each in a thread of its own; the
    others wait in the order of their arrival.
    """

    api_key: str | None = field(default=None, repr=False)
    max_running: int = 64
    max_choices: int = MAX_SAMPLES
    """Prompts times `n` of one request."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_choices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ApiConfig:
        return cls(api_key=environment.get(API_KEY_VARIABLE) or None)


class Server:
    """`app.state.server`."""

    def __init__(self, engine: Engine, config: ApiConfig) -> None:
        self.engine = engine
        self.config = config
        self.metrics = Metrics(engine.model_name, engine.max_model_len)
        self.runner = Runner(engine, self.metrics, config.max_running)
        self.reports = ReportLog()
        self.token_texts = TokenTexts(engine.tokenizer)
        self.created = int(time.time())

    def check_model(self, name: str | None) -> None:
        if name and name != self.engine.model_name:
            raise ApiError(404, f"there is no model {shown(name)}; this server has {self.engine.model_name!r}", "model")


def _server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


ServerDep = Annotated[Server, Depends(_server_of)]

OwnEngine = TypeVar("OwnEngine")


def engine_of(kind: type[OwnEngine]) -> Callable[[Server], OwnEngine]:
    """A dependency of a contender's own routes: the server's engine, which is of this kind."""

    def own_engine(server: ServerDep) -> OwnEngine:
        assert isinstance(server.engine, kind)
        return server.engine

    return own_engine


_ERROR = {"model": ErrorAnswer}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {**_ERROR, "description": "A field has a bad value, or the body isn't JSON by its content or by its header"},
    404: {**_ERROR, "description": "Unknown model"},
    408: {**_ERROR, "description": "Nothing more of the body came"},
    413: {**_ERROR, "description": "The body is too large"},
    "default": {**_ERROR, "description": "Any other error"},
}
"""What a path that takes a body answers beside its 200, for the OpenAPI document."""
