"""ASGI middleware on vLLM's own server: our request parameters are checked here, and our own paths served.

They are `GET /kvarena`, `GET /kvarena/requests/{id}` and `POST /kvarena/chunks`, which looks into the chunk store.
Loaded by `--middleware kvarena.engines.vllm.middleware.KVArenaMiddleware`. A bad `kv_transfer_params.kvarena` gets a
400 before the engine sees it, on every path: vLLM has many that generate. The text parts of a message become `chunks`,
for only here are they still apart; and `chunks` become token ids, for the scheduler has no time to tokenise.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.tokenizers import cached_tokenizer_from_config

from kvarena.asgi import error_response, json_response, read_body, replayed, route_path
from kvarena.core.matching import Segmenter, encode_alone, prompt_beginning
from kvarena.core.plan import as_token_ids
from kvarena.core.store import ChunkMiss
from kvarena.engines.base import check_in_vocabulary
from kvarena.engines.vllm.config import (
    KEY,
    MAX_NAMED_CHUNKS,
    BlendConfig,
    NamedChunk,
    given_params,
    read_chunks,
    read_request_params,
)
from kvarena.engines.vllm.messages import wait_for_report
from kvarena.engines.vllm.scheduler import chunk_salt
from kvarena.policies.params import POLICIES, describe_parameters, make_policy

_WITHOUT_SALT = ("/cohere/v2/chat",)
"""Paths on which vLLM ignores `cache_salt`."""
_WITHOUT_PARAMETERS = ("/v1/systemone", "/generative_scoring")
"""Paths that generate and on which vLLM ignores `kv_transfer_params`."""
_REPORT_PATH = "/kvarena/requests/"
_CHUNKS_PATH = "/kvarena/chunks"
_LOOK_UP_KEYS = ("prompt", "cache_salt", "chunks", "scores")
MAX_CONTEXTS = 4
"""All named chunks together may have this many times the context's tokens."""
MAX_FULL_SEQUENCES = 4
"""With that many chunk tokens a request may have this many answers; with fewer tokens, more."""
MAX_BYTES_PER_TOKEN = 4
"""Longer texts aren't tokenised in the first place."""


class KVArenaMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._chunks: _Chunks | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        if scope["method"] == "GET" and path == "/kvarena":
            await json_response(await _describe(scope))(scope, receive, send)
        elif scope["method"] == "GET" and path.startswith(_REPORT_PATH):
            await (await _report(path.removeprefix(_REPORT_PATH)))(scope, receive, send)
        elif scope["method"] == "POST" and path == _CHUNKS_PATH:
            await (await self._look_up(scope, receive))(scope, receive, send)
        elif scope["method"] == "POST" and _is_json(scope):
            await self._check_and_pass(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _check_and_pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, changed only where it has chunks; what isn't a JSON object vLLM refuses."""
        body = await _read_whole(receive)
        request = _parse_object(body)
        if request is not None:
            try:
                _check(request, scope)
                if chunks := await self._encoded_chunks(request, scope):
                    body = json.dumps(_with_chunks(request, chunks)).encode()
            except (ValueError, RecursionError) as error:
                await error_response(400, str(error))(scope, receive, send)
                return
        whole = {"type": "http.request", "body": body, "more_body": False}
        await self._app(_with_length(scope, body), replayed([whole], receive), send)

    async def _encoded_chunks(self, request: dict[str, Any], scope: Scope) -> Sequence[NamedChunk]:
        """Message parts are only a hint: where they are too much for chunks, they are left as they are."""
        chunks, transfer = self._chunks_of(scope), request.get("kv_transfer_params")
        if named := given_params(transfer).get("chunks"):
            return await chunks.encode(named, _num_sequences(request))
        parts = list(_message_parts(request)) if named is None and isinstance(transfer, dict | None) else []
        if not 0 < len(parts) <= MAX_NAMED_CHUNKS:
            return []
        try:
            return await chunks.encode(parts, _num_sequences(request))
        except ValueError:
            return []

    def _chunks_of(self, scope: Scope) -> _Chunks:
        self._chunks = self._chunks or _Chunks(_config(scope), _vllm_config(scope).model_config)
        return self._chunks

    async def _look_up(self, scope: Scope, receive: Receive) -> Response:
        """Which of a prompt's chunks the store has now."""
        request = _parse_object(await _read_whole(receive))
        try:
            prompt, cache_salt, named, scores = _read_look_up(request)
            token_ids, chunks, sink = await self._chunks_of(scope).find(prompt, named)
        except ValueError as error:
            return error_response(400, str(error))
        long_enough = [chunk for chunk in chunks if "reason" not in chunk]
        texts = [token_ids[chunk["start"] : chunk["end"]] for chunk in long_enough]
        engine, salt = scope["app"].state.engine_client, chunk_salt(cache_salt)
        question = (texts, salt, sink, scores)
        workers = await engine.collective_rpc("kvarena_missing", args=question) if texts else [[]]
        for chunk, lacking in zip(long_enough, workers[0], strict=True):
            chunk |= _state(lacking, scores)
        return json_response({"num_prompt_tokens": len(token_ids), "chunks": chunks})


def _state(lacking: ChunkMiss | None, scores: bool) -> dict[str, Any]:
    """Of a chunk: whether the store has it, with its scores where they are asked for, or else why not."""
    if lacking in ("not_stored", "store_down"):
        return {"held": False, "reason": lacking}
    return {"held": True, **({"scored": lacking is None} if scores else {})}


class _Chunks:
    """Tokenises chunks, and finds what a prompt marks as chunks, as the scheduler does: outside of the event loop, one
    request's after the other's, with a tokenizer of its own, for vLLM's is used by other threads.
    """

    def __init__(self, config: BlendConfig, model_config: Any) -> None:
        self._config, self._model_config = config, model_config
        self._max_tokens = MAX_CONTEXTS * int(model_config.max_model_len)
        self._thread = ThreadPoolExecutor(1, "kvarena chunks")

    async def encode(self, chunks: Sequence[NamedChunk], num_sequences: int = 1) -> Sequence[NamedChunk]:
        """Token ids of texts; where vLLM runs without a tokenizer they stay texts. Raises `ValueError` for halves of
        characters, and for more chunks than `num_sequences` that are planned with them may have.
        """
        num_bytes = sum(len(chunk.encode()) for chunk in chunks if isinstance(chunk, str))
        if num_bytes > (most := MAX_BYTES_PER_TOKEN * self._max_tokens):
            raise ValueError(f"chunks have {num_bytes} bytes; with this model's context at most {most}")
        encoded = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, chunks)
        num_tokens = sum(len(chunk) for chunk in encoded if isinstance(chunk, list))
        if num_tokens > self._max_tokens:
            raise ValueError(f"chunks have {num_tokens} tokens; with this model's context at most {self._max_tokens}")
        if num_tokens * num_sequences > (most := MAX_FULL_SEQUENCES * self._max_tokens):
            each = f"{num_tokens} tokens for each of {num_sequences} answers"
            raise ValueError(f"chunks have {each}; with this model's context at most {most} together")
        return encoded

    def _encode(self, chunks: Sequence[NamedChunk]) -> Sequence[NamedChunk]:
        if self._tokenizer is None:
            return chunks
        return [encode_alone(self._tokenizer, chunk) if isinstance(chunk, str) else chunk for chunk in chunks]

    async def find(
        self, prompt: str | list[int], named: Sequence[NamedChunk]
    ) -> tuple[list[int], list[dict[str, Any]], list[int]]:
        """The prompt's token ids, the ranges of its chunks, and the sink that they are computed after. Chunks that are
        too short to be kept are held nowhere.

        Raises `ValueError` as `encode`, and for a prompt that doesn't fit the model.
        """
        encoded = await self.encode(named)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._find, prompt, encoded)

    def _find(
        self, prompt: str | list[int], named: Sequence[NamedChunk]
    ) -> tuple[list[int], list[dict[str, Any]], list[int]]:
        token_ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if len(token_ids) > (most := self._model_config.max_model_len):
            raise ValueError(f"the prompt has {len(token_ids)} tokens; this model's context has {most}")
        if token_ids:
            check_in_vocabulary(token_ids, self._model_config.get_vocab_size())
        chunks: list[dict[str, Any]] = []
        for start, end in self._segmenter.segments(as_token_ids(token_ids), named):
            is_short = end - start < self._config.min_chunk_tokens
            chunks.append({"start": start, "end": end} | ({"held": False, "reason": "too_short"} if is_short else {}))
        return token_ids, chunks, self._sink

    @cached_property
    def _tokenizer(self) -> Any:
        return copy.deepcopy(cached_tokenizer_from_config(self._model_config))

    @cached_property
    def _segmenter(self) -> Segmenter:
        return Segmenter(self._tokenizer, self._config.separator)

    @cached_property
    def _sink(self) -> list[int]:
        sink: list[int] = prompt_beginning(self._tokenizer, self._config.sink_tokens).tolist()
        return sink


def _read_look_up(body: dict[str, Any] | None) -> tuple[str | list[int], str, tuple[NamedChunk, ...], bool]:
    """The body of `POST /kvarena/chunks`: a prompt, as a completion has it, its salt, the texts in it that are named,
    and whether to look for their scores. Raises `ValueError` naming the key or value and the choices.
    """
    if body is None:
        raise ValueError("the body must be a JSON object")
    if unknown := sorted(set(body) - set(_LOOK_UP_KEYS)):
        raise ValueError(f"there is no {unknown[0]!r}; it takes {', '.join(_LOOK_UP_KEYS)}")
    prompt, cache_salt = body.get("prompt"), body.get("cache_salt") or ""
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(i) is int for i in prompt)):
        raise ValueError("prompt must be a text or a list of token ids")
    if not isinstance(cache_salt, str):
        raise ValueError(f"cache_salt must be a string, not {cache_salt!r}")
    for text in (prompt, cache_salt):
        if isinstance(text, str):
            text.encode()  # raises for halves of characters
    scores = body.get("scores", False)
    if not isinstance(scores, bool):
        raise ValueError(f"scores must be true or false, not {scores!r}")
    return prompt, cache_salt, read_chunks(body), scores


async def _describe(scope: Scope) -> dict[str, Any]:
    config = _config(scope)
    refusal = await _refusal(scope)
    return {
        "contender": "blend",
        "policies": list(POLICIES),
        "timed_policies": [name for name in POLICIES if dataclasses.replace(config.params, policy=name).goes_by_ratio],
        "parameters": describe_parameters(),
        "token_scores": True,
        "defaults": {**dataclasses.asdict(config.params), "max_ttft_ms": config.max_ttft_ms},
        "separator": config.separator,
        "sink_tokens": config.sink_tokens,
        "seams": config.seams,
        "store": config.store,
        "min_chunk_tokens": config.min_chunk_tokens,
        "num_layers": _num_layers(scope),
        "reads_scores": make_policy(config.params).reads_scores,
        "blends": not refusal,
        **({"reason": refusal} if refusal else {}),
    }


async def _refusal(scope: Scope) -> str:
    """Why this model is served without blending. The workers are asked once, for it never changes."""
    state = scope["app"].state
    if not hasattr(state, "kvarena_refusal"):
        refusals: list[str] = await state.engine_client.collective_rpc("kvarena_refusal")
        state.kvarena_refusal = next(filter(None, refusals), "")
    return str(state.kvarena_refusal)


def _num_layers(scope: Scope) -> int:
    return int(_vllm_config(scope).model_config.hf_text_config.num_hidden_layers)


async def _report(request_id: str) -> Response:
    """Waits, for a client may ask a moment too early."""
    report = await wait_for_report(request_id)
    return json_response(report) if report else error_response(404, f"no report of a request {request_id!r}")


def _check(request: dict[str, Any], scope: Scope) -> None:
    """Raise `ValueError` for parameters of ours that are wrong, or that the engine would never see."""
    path = route_path(scope)
    if path in _WITHOUT_SALT and request.get("cache_salt"):
        raise ValueError(f"{path} takes no cache_salt")
    transfer = request.get("kv_transfer_params")
    if path in _WITHOUT_PARAMETERS and transfer:
        raise ValueError(f"{path} takes no kv_transfer_params")
    if _hidden_params(request):
        raise ValueError("kv_transfer_params belong into the request itself, not into sampling_params.extra_args")
    given, config = given_params(transfer), _config(scope)
    params = read_request_params(transfer, config.params, config.max_ttft_ms)
    if "check_layer" in given:
        params.blend.check_for(_num_layers(scope))


def _num_sequences(request: Mapping[str, Any]) -> int:
    """How many answers the engine makes of it, if it is well-formed: some for each prompt, or for each chat."""
    n = request.get("n")
    lists = [each for each in (request.get("prompt"), request.get("messages")) if isinstance(each, list) and each]
    num_prompts = max((len(each) for each in lists if isinstance(each[0], str | list)), default=1)
    return num_prompts * (n if isinstance(n, int) and n > 1 else 1)


def _hidden_params(request: Mapping[str, Any]) -> bool:
    """Whether vLLM's own sampling parameters, as `/inference/v1/generate` takes them, carry ours past this check."""
    sampling = request.get("sampling_params")
    extra = sampling.get("extra_args") if isinstance(sampling, dict) else None
    return isinstance(extra, dict) and "kv_transfer_params" in extra


def _message_parts(request: Mapping[str, Any]) -> Iterator[str]:
    """The texts of messages with several text parts, also in a batch of conversations."""
    messages = request.get("messages") or request.get("input")
    for entry in messages if isinstance(messages, list) else ():
        for message in entry if isinstance(entry, list) else (entry,):
            parts = message.get("content") if isinstance(message, dict) else None
            found = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
            if len(found) > 1:
                yield from (text for text in found if isinstance(text, str))


def _with_chunks(request: dict[str, Any], chunks: Sequence[NamedChunk]) -> dict[str, Any]:
    transfer = request.get("kv_transfer_params") or {}
    ours = {**given_params(transfer), "chunks": chunks}
    return {**request, "kv_transfer_params": {**transfer, KEY: ours}}


def _is_json(scope: Scope) -> bool:
    """On the paths that generate, vLLM refuses other bodies."""
    content_type = Headers(scope=scope).get("content-type", "")
    return content_type.partition(";")[0].strip().lower() == "application/json"


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


async def _read_whole(receive: Receive) -> bytes:
    return b"".join(message.get("body", b"") for message in await read_body(receive) or ())


def _with_length(scope: Scope, body: bytes) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
