"""What the routes of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from kvarena.api.config import ApiConfig
from kvarena.api.engine import Engine
from kvarena.api.errors import ApiError, shown
from kvarena.api.metrics import Metrics
from kvarena.api.report_log import ReportLog
from kvarena.api.response_models import ErrorAnswer
from kvarena.api.runner import Runner
from kvarena.api.token_texts import TokenTexts


@dataclass(frozen=True)
class Server:
    """`app.state.server`."""

    engine: Engine
    config: ApiConfig
    metrics: Metrics
    runner: Runner
    reports: ReportLog
    token_texts: TokenTexts
    created: int

    @classmethod
    def of(cls, engine: Engine, config: ApiConfig) -> Server:
        metrics = Metrics(engine.model_name, engine.max_model_len)
        runner = Runner(engine, metrics, config.max_running)
        return cls(engine, config, metrics, runner, ReportLog(), TokenTexts(engine.tokenizer), int(time.time()))

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.engine.model_name:
            raise ApiError(404, f"there is no model {shown(name)}; this server has {self.engine.model_name!r}", "model")


def _server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


TheServer = Annotated[Server, Depends(_server_of)]

_ERROR = {"model": ErrorAnswer}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {**_ERROR, "description": "A field has a bad value, or the body isn't JSON"},
    404: {**_ERROR, "description": "Unknown model"},
    413: {**_ERROR, "description": "The body is too large"},
    415: {**_ERROR, "description": "The content type isn't application/json"},
    "default": {**_ERROR, "description": "Any other error"},
}
"""What a path that takes a body answers beside its 200, for the OpenAPI document."""
