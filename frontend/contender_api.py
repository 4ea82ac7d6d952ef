"""What a contender says it is, the request that it gets, and what can go wrong, in words for the page's user.

Data and texts only; `chat_session.py` does the HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvarena.client import ClientError, ServerInfo, Unreachable
from settings import Service, read_fields

Message = Mapping[str, str]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a policy as the server describes it: a number within bounds, or one of `choices`.

    `default` is the server's own. `policies` are those that have it. `explanations` has a line on each choice.
    """

    name: str
    kind: str
    default: Any
    help: str
    policies: Sequence[str]
    at_least: float = 0.0
    at_most: float = 0.0
    choices: Sequence[str] = ()
    explanations: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return RATIO_LABEL if self.name == RATIO else self.name.replace("_", " ").capitalize()

    def takes(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.at_least <= value <= self.at_most

    @classmethod
    def read(cls, name: str, described: Mapping[str, Any], defaults: Mapping[str, Any]) -> Parameter:
        default = defaults.get(name, described["default"])
        return read_fields(cls, {**described, "name": name, "kind": described["type"], "default": default})


NUM_ALTERNATIVES = 5
RATIO_LABEL = "Recompute share (0 fastest, 1 exact)"
POLICY, RATIO, MAX_TTFT_MS = "policy", "ratio", "max_ttft_ms"
"""A request's names for the policy, and for how much it recomputes: a ratio, or a time in its place."""


@dataclass(frozen=True)
class BlendOffer:
    """What `GET /kvarena` of a contender that blends offers.

    `policy` is None if it names none. `timed_policies` can choose their ratio by a time to first token; `max_ttft_ms`
    is the server's own. `tells_scores`: reports can have the scores that tokens were chosen by. `has_seams`: a chunk is
    also kept as it is after the chunk before it.
    """

    policy: Parameter | None
    parameters: tuple[Parameter, ...]
    separator: str
    timed_policies: tuple[str, ...] = ()
    max_ttft_ms: float | None = None
    tells_scores: bool = False
    has_seams: bool = False

    @classmethod
    def read(cls, offer: Mapping[str, Any]) -> BlendOffer:
        defaults = offer.get("defaults") or {}
        described = offer.get("parameters") or {}
        parameters = {name: Parameter.read(name, one, defaults) for name, one in described.items()}
        return cls(
            policy=parameters.pop(POLICY, None),
            parameters=tuple(parameters.values()),
            separator=offer.get("separator") or "",
            timed_policies=tuple(offer.get("timed_policies") or ()),
            max_ttft_ms=defaults.get(MAX_TTFT_MS),
            tells_scores=offer.get("token_scores") is True,
            has_seams=offer.get("seams") is True,
        )

    def parameters_of(self, policy: str, within_time: bool) -> tuple[Parameter, ...]:
        """`within_time`: a time to first token chooses the ratio."""
        own = [one for one in self.parameters if policy in one.policies]
        return tuple(one for one in own if not (within_time and one.name == RATIO))


@dataclass(frozen=True)
class SimLLMOffer:
    """What `GET /kvarena` of a contender that reuses similar earlier prompts offers. `similarity_threshold` None: the
    server finds its own.
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
    """A contender that is up. `blend`, `simllm`: what it offers, if it blends or looks for similar prompts."""

    model: str
    max_model_len: int | None
    blend: BlendOffer | None
    simllm: SimLLMOffer | None
    keeps_reports: bool
    has_slots: bool = False

    @classmethod
    def read(cls, info: ServerInfo, report: str = "") -> Server:
        """`report` is the contender's; the offer of that name exists only if the server offers something."""
        offer = info.offer
        return cls(
            model=info.model,
            max_model_len=info.max_model_len,
            blend=BlendOffer.read(offer) if offer and report == "blend" else None,
            simllm=SimLLMOffer.read(offer) if offer and report == "similar_task" else None,
            keeps_reports=offer is not None,
            has_slots=offer is not None and report == "slots",
        )


@dataclass(frozen=True)
class Sampling:
    """What is asked of every contender alike. `recomputing`, a policy and its parameters by name, goes to those that
    blend; `mode` and `similarity_threshold` to those that look for similar prompts; `use_cache`, `notes` (whether the
    server adds its own) and `topic` (empty: the server finds it) to those with KV slots. None means the server's
    default. `conversation` names one, if not empty. `probabilities`: of each token of the answer and its likeliest
    alternatives, and the score that each recomputed token of the prompt was chosen by.
    """

    temperature: float = 0.0
    max_tokens: int = 128
    ignore_eos: bool = False
    recomputing: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    similarity_threshold: float | None = None
    use_cache: bool | None = None
    notes: bool = False
    topic: str = ""
    conversation: str = ""
    probabilities: bool = False


def completion_request(server: Server, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
    """The body of `POST /v1/chat/completions`: OpenAI's fields, and vLLM's where they are needed."""
    body: dict[str, Any] = {
        "model": server.model,
        "messages": list(messages),
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
    }
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if sampling.probabilities:
        body |= {"logprobs": True, "top_logprobs": NUM_ALTERNATIVES}
    if sampling.conversation:
        body["session_id"] = sampling.conversation
    if chosen := _reuse_choices(server, sampling):
        body["kv_transfer_params"] = {"kvarena": chosen}
    return body


def _reuse_choices(server: Server, sampling: Sampling) -> dict[str, Any]:
    """What was chosen of what this kind of contender can be told about reuse."""
    chosen: dict[str, Any] = {}
    if server.blend:
        chosen = dict(sampling.recomputing)
        if sampling.probabilities and server.blend.tells_scores:
            chosen["token_scores"] = True
    elif server.simllm:
        chosen = {"mode": sampling.mode, "similarity_threshold": sampling.similarity_threshold}
    elif server.has_slots:
        chosen = {"use_cache": sampling.use_cache, "notes": sampling.notes, "topic": sampling.topic or None}
    return {key: value for key, value in chosen.items() if value is not None}


class ContenderError(Exception):
    """A contender couldn't be reached, refused, or broke off. Its pane shows the message as it is."""


@contextmanager
def explained(server: Service) -> Iterator[None]:
    """Turns the client's errors, and answers of an unexpected form, into `ContenderError`."""
    try:
        yield
    except Unreachable as error:
        raise ContenderError(
            f"Nothing answers at {server.url}. Is the server running, or still starting? "
            f"./run-server.sh status and ./run-server.sh logs {server.log_name} say more."
        ) from error
    except ClientError as error:
        raise ContenderError(f"{server.title}: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ContenderError(f"{server.title} answered in a form that is not the OpenAI API: {error!r}") from error
