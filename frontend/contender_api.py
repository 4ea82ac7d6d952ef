"""What a contender says it is, the request that it gets, and what can go wrong, in words for the person at the page.

Data and texts only; `chat_session.py` does the HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from settings import Contender

Message = Mapping[str, str]


@dataclass(frozen=True)
class BlendOffer:
    """What `GET /kvarena` of a contender that blends offers.

    `timed_policies` are those whose ratio can be left to a time to first token, `max_ttft_ms` the server's own.
    """

    policies: tuple[str, ...]
    policy: str
    ratio: float
    separator: str
    timed_policies: tuple[str, ...] = ()
    max_ttft_ms: float | None = None

    @classmethod
    def read(cls, offer: Mapping[str, Any]) -> BlendOffer:
        defaults = offer.get("defaults") or {}
        policies = tuple(offer.get("policies") or ())
        return cls(
            policies=policies,
            policy=defaults.get("policy") or (policies[0] if policies else ""),
            ratio=float(defaults.get("ratio") or 0.0),
            separator=offer.get("separator") or "",
            timed_policies=tuple(offer.get("timed_policies") or ()),
            max_ttft_ms=defaults.get("max_ttft_ms"),
        )


@dataclass(frozen=True)
class RecomputeOptions:
    """What a blend is told to recompute: a policy, and a share of the reused tokens or a time to first token. None: the
    server's own.
    """

    policy: str | None = None
    ratio: float | None = None
    max_ttft_ms: float | None = None


@dataclass(frozen=True)
class SimLLMOffer:
    """What `GET /kvarena` of a contender that reuses similar earlier prompts offers.

    `similarity_threshold` None: the server finds its own.
    """

    modes: tuple[str, ...]
    mode: str
    similarity_threshold: float | None

    @classmethod
    def read(cls, offer: Mapping[str, Any]) -> SimLLMOffer:
        defaults = offer["defaults"]
        threshold = defaults["similarity_threshold"]
        return cls(
            modes=tuple(offer["modes"]),
            mode=defaults["mode"],
            similarity_threshold=float(threshold) if isinstance(threshold, int | float) else None,
        )


@dataclass(frozen=True)
class Server:
    """A contender that is up. `blend`, `simllm`: what it offers, if it is one of these. `has_slots`: it is ai100."""

    model: str
    max_model_len: int | None
    blend: BlendOffer | None
    simllm: SimLLMOffer | None
    keeps_reports: bool
    has_slots: bool = False

    @classmethod
    def read(cls, model: Mapping[str, Any], offer: Mapping[str, Any] | None) -> Server:
        """`offer`: what `GET /kvarena` answered; None where there is no such path, as in stock vLLM."""
        said = offer or {}
        contender = said.get("contender")
        return cls(
            model=model["id"],
            max_model_len=model.get("max_model_len"),
            blend=BlendOffer.read(said) if contender == "blend" else None,
            simllm=SimLLMOffer.read(said) if contender == "simllm" else None,
            keeps_reports=offer is not None,
            has_slots=contender == "ai100",
        )


@dataclass(frozen=True)
class Sampling:
    """What is asked of every contender alike. `recomputing` goes to those that blend, `mode` and `similarity_threshold`
    to those that look for similar prompts, `use_cache` and `notes` (whether the server adds notes of its own) to those
    with KV slots; None: their default. `user` names a conversation, where it isn't empty.
    """

    temperature: float = 0.0
    max_tokens: int = 128
    ignore_eos: bool = False
    recomputing: RecomputeOptions = RecomputeOptions()
    mode: str | None = None
    similarity_threshold: float | None = None
    use_cache: bool | None = None
    notes: bool = False
    user: str = ""


def completion_request(server: Server, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
    """The body of `POST /v1/chat/completions`: OpenAI's fields, and vLLM's where the question needs them."""
    body: dict[str, Any] = {
        "model": server.model,
        "messages": list(messages),
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if sampling.user:
        body["user"] = sampling.user
    if chosen := _reuse_choices(server, sampling):
        body["kv_transfer_params"] = {"kvarena": chosen}
    return body


def _reuse_choices(server: Server, sampling: Sampling) -> dict[str, Any]:
    """What this kind of contender can be told about its reuse, as far as it was chosen."""
    chosen: dict[str, Any] = {}
    if server.blend:
        chosen = asdict(sampling.recomputing)
    elif server.simllm:
        chosen = {"mode": sampling.mode, "similarity_threshold": sampling.similarity_threshold}
    elif server.has_slots:
        chosen = {"use_cache": sampling.use_cache, "notes": sampling.notes}
    return {key: value for key, value in chosen.items() if value is not None}


MAX_DETAIL_CHARS = 600


class ContenderError(Exception):
    """A contender could not be reached, refused, or broke off. The message is shown in its pane as it is."""


@contextmanager
def explained(contender: Contender, timeout_s: float) -> Iterator[None]:
    """Turns what the HTTP client raises, and replies of an unexpected shape, into `ContenderError`."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ContenderError(
            f"Nothing answers at {contender.url}. Is the server running, or still starting? "
            f"./run-server.sh status and ./run-server.sh logs {contender.service or contender.name} say more."
        ) from error
    except httpx.TimeoutException as error:
        raise ContenderError(
            f"{contender.title} said nothing for {timeout_s:g} s; the request was given up."
        ) from error
    except httpx.HTTPError as error:
        raise ContenderError(
            f"The connection to {contender.url} broke off ({type(error).__name__}). The server may have stopped."
        ) from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ContenderError(f"{contender.title} answered in a form that is not the OpenAI API: {error!r}") from error


def http_error(contender: Contender, response: httpx.Response, body: Mapping[str, Any] | None = None) -> ContenderError:
    """The error object of a response, or of an event within its stream (`body`)."""
    status = f"HTTP {response.status_code}" if body is None else "an error in the stream"
    return ContenderError(f"{contender.title}: {status}: {_detail(response, body)}")


def stream_error(contender: Contender, num_texts: int) -> ContenderError:
    after = f"after {num_texts} pieces of text" if num_texts else "before its first token"
    return ContenderError(f"{contender.title}: the stream ended {after}, without a finish.")


def _detail(response: httpx.Response, body: Mapping[str, Any] | None) -> str:
    """The message in OpenAI's, vLLM's older and FastAPI's error objects; else the text itself."""
    if body is None:
        try:
            body = response.json()
        except ValueError:
            return response.text.strip()[:MAX_DETAIL_CHARS] or response.reason_phrase
    found: Any = body
    if isinstance(body, Mapping):
        error = body.get("error")
        found = error.get("message") if isinstance(error, Mapping) else error
        found = found or body.get("message") or body.get("detail") or body
    return str(found)[:MAX_DETAIL_CHARS]
