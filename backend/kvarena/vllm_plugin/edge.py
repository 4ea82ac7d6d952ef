"""ASGI middleware around vLLM's own server: it treats requests as the arena's other servers do.

Loaded by `--middleware kvarena.vllm_plugin.edge.Edge`, named last so that it is the outermost. From the outside in:

| | vLLM alone | here |
|---|---|---|
| request id | any `X-Request-Id` is taken | one that is usable; every answer says it |
| API key | for `/v1` and few others: `/invocations` generates without | for all but health and metrics |
| log | uvicorn's access log | the line of `api/request_log.py` |

It needs nothing of the plugin, and serves stock vLLM as well.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import envs

from kvarena.api.auth import ApiKeyCheck
from kvarena.api.request_ids import RequestIds
from kvarena.api.request_log import write_to_standard_output
from kvarena.vllm_plugin.answer_log import AnswerLog
from kvarena.vllm_plugin.config import CONNECTOR, CONTENDER_VARIABLE

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Edge:
    """The keys are vLLM's own: those of `--api-key`, else `VLLM_API_KEY`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._layers: ASGIApp | None = None
        write_to_standard_output()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._layers = self._layers or _layered(self._app, scope)
        await self._layers(scope, receive, send)


def _layered(app: ASGIApp, scope: Scope) -> ASGIApp:
    """What vLLM's server is told stands where its requests can see it, and nowhere before the first one."""
    state = scope["app"].state
    contender = os.environ.get(CONTENDER_VARIABLE) or "vllm"
    logged: ASGIApp = AnswerLog(app, contender, has_reports=_blends(state.vllm_config))
    api_keys = [key for key in state.args.api_key or [envs.VLLM_API_KEY] if key]
    return RequestIds(ApiKeyCheck(logged, contender, api_keys) if api_keys else logged)


def _blends(vllm_config: VllmConfig) -> bool:
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR
