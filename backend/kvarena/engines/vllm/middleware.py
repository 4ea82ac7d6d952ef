"""ASGI middleware on vLLM's own server: our request parameters are checked here, and our own paths served.

Loaded by `--middleware kvarena.engines.vllm.middleware.KVArenaMiddleware`. A bad `kv_transfer_params.kvarena` gets a
400 before the engine sees it; the text parts of a chat message become `chunks`, for only here are they still apart.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvarena.engines.vllm.config import KEY, BlendConfig, given_params, read_request_params
from kvarena.engines.vllm.messages import wait_for_report
from kvarena.policies.params import POLICIES, describe_parameters

_GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""All that take `kv_transfer_params` in vLLM."""
_REPORT_PATH = "/kvarena/requests/"


class KVArenaMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "GET" and scope["path"] == "/kvarena":
            await _send_json(send, 200, await _describe(scope))
        elif scope["method"] == "GET" and scope["path"].startswith(_REPORT_PATH):
            await _send_report(send, scope["path"].removeprefix(_REPORT_PATH))
        elif scope["method"] == "POST" and scope["path"] in _GENERATING:
            await self._generate(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on the request, changed only where it has message parts; what isn't JSON is vLLM's to refuse."""
        body = await _read_body(receive)
        request = _parse_object(body)
        if request is not None:
            try:
                _check(request, scope)
            except ValueError as error:
                await _send_error(send, 400, str(error), "BadRequestError")
                return
            if parts := _message_parts(request):
                body = json.dumps(_with_chunks(request, parts)).encode()
        await self._app(_with_length(scope, body), _replay(body, receive), send)


async def _describe(scope: Scope) -> dict[str, Any]:
    config = _config(scope)
    refusal = await _refusal(scope)
    return {
        "contender": "blend",
        "policies": list(POLICIES),
        "timed_policies": [name for name in POLICIES if dataclasses.replace(config.params, policy=name).goes_by_ratio],
        "parameters": describe_parameters(),
        "defaults": {**dataclasses.asdict(config.params), "max_ttft_ms": config.max_ttft_ms},
        "separator": config.separator,
        "store": config.store,
        "min_chunk_tokens": config.min_chunk_tokens,
        "num_layers": _num_layers(scope),
        "blends": not refusal,
        **({"reason": refusal} if refusal else {}),
    }


async def _refusal(scope: Scope) -> str:
    """Why this model is served without blending. Its workers know; it never changes, so they are asked once."""
    state = scope["app"].state
    if not hasattr(state, "kvarena_refusal"):
        refusals: list[str] = await state.engine_client.collective_rpc("kvarena_refusal")
        state.kvarena_refusal = next(filter(None, refusals), "")
    return str(state.kvarena_refusal)


def _num_layers(scope: Scope) -> int:
    return int(_vllm_config(scope).model_config.hf_text_config.num_hidden_layers)


async def _send_report(send: Send, request_id: str) -> None:
    """A client may ask a moment too early."""
    report = await wait_for_report(request_id)
    if report is None:
        await _send_error(send, 404, f"no report of a request {request_id!r}", "NotFoundError")
    else:
        await _send_json(send, 200, report)


def _check(request: dict[str, Any], scope: Scope) -> None:
    """Raise `ValueError` for parameters of ours that the engine would not understand."""
    given, config = given_params(request.get("kv_transfer_params")), _config(scope)
    params = read_request_params(request.get("kv_transfer_params"), config.params, config.max_ttft_ms)
    num_layers = _num_layers(scope)
    if "check_layer" in given:
        params.blend.check_for(num_layers)


def _message_parts(request: dict[str, Any]) -> list[str]:
    """The texts of messages that come in several text parts; none where the client names its chunks itself."""
    messages, transfer = request.get("messages"), request.get("kv_transfer_params")
    if not isinstance(messages, list) or not isinstance(transfer, dict | None) or "chunks" in given_params(transfer):
        return []
    texts: list[str] = []
    for message in messages:
        parts = message.get("content") if isinstance(message, dict) else None
        found = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        texts += [text for text in found if isinstance(text, str)] if len(found) > 1 else []
    return texts


def _with_chunks(request: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    transfer = request.get("kv_transfer_params") or {}
    ours = {**given_params(transfer), "chunks": texts}
    return {**request, "kv_transfer_params": {**transfer, KEY: ours}}


def _vllm_config(scope: Scope) -> Any:
    return scope["app"].state.vllm_config


def _config(scope: Scope) -> BlendConfig:
    return BlendConfig.from_extra_config(_vllm_config(scope).kv_transfer_config.kv_connector_extra_config)


def _parse_object(body: bytes) -> dict[str, Any] | None:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):  # nested without end
        return None
    return request if isinstance(request, dict) else None


async def _read_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then whatever comes from the client (its going away)."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_length(scope: Scope, body: bytes) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


async def _send_error(send: Send, status: int, message: str, kind: str) -> None:
    error = {"message": message, "type": kind, "param": None, "code": status}
    await _send_json(send, status, {"error": error})


async def _send_json(send: Send, status: int, content: object) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
