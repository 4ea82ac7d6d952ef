"""What a server says about itself: health, models, settings, reports of requests, metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse, Response

from kvarena.api.errors import ApiError, shown
from kvarena.api.response_models import ErrorAnswer, Model, ModelList, RequestReport
from kvarena.api.server import Server, TheServer

open_router = APIRouter()
"""Paths that ask for no API key."""

router = APIRouter()

_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}, "default": {"model": ErrorAnswer}}


@open_router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@open_router.get("/metrics", response_class=PlainTextResponse)
def metrics(server: TheServer) -> Response:
    """In a thread of its own: an engine's collectors may wait for its locks."""
    return Response(server.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(server: TheServer) -> ModelList:
    return ModelList(object="list", data=[_model(server)])


@router.get("/v1/models/{name:path}", responses=_UNKNOWN)
async def model(name: str, server: TheServer) -> Model:
    server.check_model(name)
    return _model(server)


@router.get("/kvarena")
async def settings(server: TheServer) -> dict[str, Any]:
    return {"contender": server.engine.contender, **server.engine.describe()}


@router.get("/kvarena/requests/{request_id:path}", response_model=RequestReport, responses=_UNKNOWN)
async def request_report(request_id: str, server: TheServer) -> Response:
    """The report of a finished request, by the id of its answer; the last 1,024 are kept."""
    report = server.reports.get(request_id)
    if report is None:
        raise ApiError(404, f"there is no report of a request {shown(request_id)}")
    return JSONResponse(report)


def _model(server: Server) -> Model:
    engine = server.engine
    return Model(
        id=engine.model_name,
        object="model",
        created=server.created,
        owned_by="kvarena",
        root=engine.model_name,
        max_model_len=engine.max_model_len,
    )
