"""From a client's request to what an engine is asked: one `GenerationRequest` for each choice of the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from kvarena.api.engine import Engine, GenerationRequest, Sampling
from kvarena.api.errors import ApiError, shown, validation_message
from kvarena.api.prompts import EnginePrompt
from kvarena.api.request_models import INT64, SamplingFields
from kvarena.api.server import Server

KEY = "kvarena"
_PATH = f"kv_transfer_params.{KEY}"


@dataclass(frozen=True)
class Prompts:
    texts: Sequence[EnginePrompt]
    add_special_tokens: bool
    messages: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def generation_requests(
    server: Server, http: Request, answer_id: str, body: SamplingFields, sampling: Sampling, prompts: Prompts
) -> list[GenerationRequest]:
    """Each prompt `n` times. Where there are several, the id gets the choice's number behind it."""
    num_samples, limit = body.n or 1, server.config.max_choices
    if len(prompts.texts) * num_samples > limit:
        raise ApiError(400, f"{len(prompts.texts)} prompts times n {num_samples} is more than {limit} choices", "n")
    options = read_options(server.engine, body.kv_transfer_params)
    requests = [
        GenerationRequest(
            request_id=answer_id,
            prompt=prompt,
            sampling=_sample(sampling, sample),
            http_request_id=http.state.request_id,
            add_special_tokens=prompts.add_special_tokens,
            messages=prompts.messages,
            template_arguments=prompts.template_arguments,
            sample=sample,
            num_samples=num_samples,
            cache_salt=body.cache_salt or "",
            conversation_id=http.headers.get("x-conversation-id") or body.user or None,
            options=options,
        )
        for prompt in prompts.texts
        for sample in range(num_samples)
    ]
    if len(requests) == 1:
        return requests
    return [replace(request, request_id=f"{answer_id}-{index}") for index, request in enumerate(requests)]


def sampling_of(body: SamplingFields, *, max_tokens: int | None, num_logprobs: int | None) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        seed=body.seed,
        num_logprobs=num_logprobs,
        ignore_eos=bool(body.ignore_eos),
    )


def _sample(sampling: Sampling, index: int) -> Sampling:
    """The samples of a prompt differ also where a seed is given: the second has the next seed."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index + INT64) % (2 * INT64) - INT64)


def read_options(engine: Engine, kv_transfer_params: Mapping[str, Any] | None) -> BaseModel | None:
    """The engine's own parameters. Raises `ApiError` naming the key or value and the choices."""
    given = (kv_transfer_params or {}).get(KEY)
    if given is not None and not isinstance(given, Mapping):
        raise ApiError(400, f"{_PATH} must be an object, not {shown(given)}", _PATH)
    model = engine.options_model
    choices = [field.alias or name for name, field in model.model_fields.items()] if model else []
    if unknown := sorted(set(given or {}) - set(choices)):
        takes = f"it takes {', '.join(choices)}" if choices else f"{engine.contender} takes no parameters"
        raise ApiError(400, f"{_PATH} has no {shown(unknown[0])}; {takes}", _PATH)
    if model is None:
        return None
    try:
        return model.model_validate(given or {})
    except ValidationError as error:
        message, param = validation_message(error.errors(), prefix=f"{_PATH}.")
        raise ApiError(400, message, param) from None
