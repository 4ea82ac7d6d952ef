"""The contenders of `kvarena eval` and `calibrate`: found, warmed, asked with progress, and closed.

They are servers by address (`HTTPAnswerer`), services of the running stack by name, or engines in this process
(`hf_answerer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kvarena.bench.console import progress, read_target
from kvarena.bench.measure import Reuse
from kvarena.bench.quality.asking import (
    NUM_LOGPROBS,
    Answerer,
    Asking,
    Attempt,
    GreedyAnswer,
    InContexts,
    Messages,
    NoAnswer,
    TokenLogprobs,
    ask_all,
)
from kvarena.bench.quality.questions import QuestionSet
from kvarena.bench.variants import Variant, blend_variants, find_reference, is_blend, reads_scores
from kvarena.client import CHAT, ClientError, connect
from kvarena.documents import FALLBACK_SEPARATOR, TextChunk
from kvarena.home import Home
from kvarena.model import find_model
from kvarena.policies.params import read_model_profile
from kvarena.stack.chunk_cache import warm
from kvarena.stack.record import read_record
from kvarena.stack.settings import CONTENDERS as STACK_CONTENDERS
from kvarena.stack.settings import shown_api_key


class HTTPAnswerer(Answerer):
    """A contender at an OpenAI address: answers are streamed, and timed as its client sees them.

    Raises `ValueError` when nothing that speaks OpenAI's API answers at `url`.
    """

    def __init__(
        self, name: str, url: str, api_key: str = "", timeout_s: float = 120.0, has_logprobs: bool = True
    ) -> None:
        self.name = name
        self._has_logprobs = has_logprobs
        self._api_key = api_key
        self._client, self._server = connect(name, url, api_key, timeout_s)
        self.is_blend = is_blend(self._server)
        offer = self._server.offer or {}
        self.num_layers = offer.get("num_layers")
        self.has_seams = offer.get("seams") is True
        self.sinks = (offer["sink_tokens"],) if "sink_tokens" in offer else ()
        root = Path(self._server.root or "")
        self.model_folder = root if root.is_absolute() and root.is_dir() else None
        profile = read_model_profile(str(root)) if self.model_folder else {}
        self.separator = self._server.separator or profile.get("separator")

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        if not self.is_blend:
            return
        with _as_no_answer():
            result = warm(self._client.url, self._server.model, chunks, lambda _: on_chunk(), self._api_key)
        if result.failures:
            failed = result.failures[0]
            raise NoAnswer(f"chunk {failed.name} couldn't be put into the chunk cache: {failed.reason}")

    def compute(
        self, what: InContexts, chunks: Sequence[TextChunk], separator: str, on_prompt: Callable[[int, int], None]
    ) -> None:
        compute = self._client.score if what == "scores" else self._client.make_seams
        with _as_no_answer():
            compute(self._server.model, chunks, separator, on_prompt)

    def answer(
        self, messages: Messages, variant: Variant, asking: Asking, full: GreedyAnswer | None = None
    ) -> GreedyAnswer:
        body: dict[str, Any] = {
            "model": self._server.model,
            "messages": list(messages),
            "max_tokens": asking.max_tokens,
            "temperature": 0,
        }
        if self._has_logprobs:
            body |= {"logprobs": True, "top_logprobs": NUM_LOGPROBS}
        if variant.choices:
            body["kv_transfer_params"] = {"kvarena": variant.choices}
        with _as_no_answer():
            streamed = self._client.stream(CHAT, body)
            report = self._client.report(streamed.request_id) if self._server.offer is not None else None
        reuse, is_complete = Reuse.read(report, streamed.usage), streamed.finish_reason == "stop"
        logprobs = [_token_logprobs(entry) for entry in streamed.logprobs]
        return GreedyAnswer(streamed.text, is_complete, streamed.ttft_ms, reuse, logprobs)

    def describe(self) -> dict[str, object]:
        return {"url": self._client.url, "model": self._server.model, "offer": self._server.offer}

    def close(self) -> None:
        self._client.close()


@contextmanager
def _as_no_answer() -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        raise NoAnswer(error.reason) from error


def _token_logprobs(entry: Mapping[str, Any]) -> TokenLogprobs:
    """Two tokens of the same text count as the likelier one."""
    top: dict[str, float] = {}
    for one in entry.get("top_logprobs") or ():
        top[one["token"]] = max(one["logprob"], top.get(one["token"], float("-inf")))
    return TokenLogprobs(entry["token"], top)


def servers(wanted: Sequence[str], timeout_s: float, has_logprobs: bool) -> dict[str, Answerer]:
    """`wanted` are names of the running stack, or `name=address`; all of the stack's when empty.

    Raises `ValueError` for a name that doesn't run and for an address at which nothing answers.
    """
    record = read_record(Home.find())
    running = {
        service.name: service.address
        for service in (record.services if record else ())
        if service.name in STACK_CONTENDERS
    }
    if not wanted and not running:
        raise ValueError(
            "nothing runs; start the stack with ./run-server.sh, or name servers: --contender name=address"
        )
    addresses = dict(_address(given, running) for given in wanted) if wanted else running
    key = shown_api_key()
    return {name: HTTPAnswerer(name, url, key, timeout_s, has_logprobs) for name, url in addresses.items()}


def default_data_dir(engine: str, model: str | None) -> Path:
    """The documents to ask about by default: the running stack's, or those that go with the model."""
    record = read_record(Home.find()) if engine == "http" else None
    return Path(record.data_dir) if record else find_model(model, "cpu").data_dir


def _address(given: str, running: dict[str, str]) -> tuple[str, str]:
    if "=" in given:
        return read_target(given, "--contender")
    if given not in running:
        raise ValueError(
            f"{given} isn't running; running: {', '.join(running) or 'nothing'}. "
            "Start it with ./run-server.sh --contenders, or give its address: --contender name=address"
        )
    return given, running[given]


@dataclass(frozen=True)
class ContenderOptions:
    """Whom to ask. `engine` is `http` (servers) or `hf` (in this process, on `model`); what is None has a default.

    `more_sinks` are offered beside the model's own; with `hf` only. `store_gb` is for the chunks of each.
    """

    engine: str = "http"
    contenders: Sequence[str] = ()
    model: str | None = None
    separator: str | None = None
    timeout_s: float = 120.0
    has_logprobs: bool = True
    store_gb: float = 2.0
    more_sinks: Sequence[int] = ()

    def find(self) -> dict[str, Answerer]:
        """Raises `ValueError` or `OSError` for what isn't there."""
        if self.engine == "hf":
            from kvarena.bench.quality.hf_answerer import engines

            return engines(self.contenders, self.model, self.separator, self.store_gb, self.more_sinks)
        if self.engine != "http":
            raise ValueError(f"engine is {self.engine!r}; it is http or hf")
        if self.model:
            raise ValueError("servers have a model already; --model goes with --engine hf")
        if self.more_sinks:
            raise ValueError("a server has the sink it was started with (SINK_TOKENS); other ones go with --engine hf")
        return servers(self.contenders, self.timeout_s, self.has_logprobs)

    @contextmanager
    def session(self, console: Console) -> Iterator[Session]:
        with console.status("Looking for the contenders ..."):
            answerers = self.find()
        blends_first = sorted(answerers.values(), key=lambda answerer: not answerer.is_blend)
        known = [self.separator, *(answerer.separator for answerer in blends_first), FALLBACK_SEPARATOR]
        try:
            yield Session(answerers, next(one for one in known if one is not None), console)
        finally:
            for answerer in answerers.values():
                answerer.close()


@dataclass(frozen=True)
class Session:
    """`separator` goes between the chunks of every contender's prompts."""

    answerers: Mapping[str, Answerer]
    separator: str
    console: Console

    def variants(self, policies: Sequence[str], ratios: Sequence[float], check_layers: Sequence[int]) -> list[Variant]:
        """Every choice for those that blend, one variant for those that don't; always with full prefill."""
        variants: list[Variant] = []
        for answerer in self.answerers.values():
            blends = blend_variants(answerer.name, policies, ratios, check_layers) if answerer.is_blend else None
            variants += blends or [Variant(answerer.name)]
        blend = next((answerer.name for answerer in self.answerers.values() if answerer.is_blend), None)
        if blend and find_reference(variants) is None:
            variants.insert(0, Variant(blend, "all"))
        return variants

    def warm(self, question_set: QuestionSet, variants: Sequence[Variant]) -> None:
        """Makes ready what these variants reuse. Raises `ValueError` when that fails."""
        reading = {own.contender for own in variants if reads_scores(own.policy)}
        blends = [answerer for answerer in self.answerers.values() if answerer.is_blend]
        try:
            with progress(len(blends) * len(question_set.chunks), self.console, "warming") as advance:
                for answerer in blends:
                    answerer.warm(question_set.chunks, self.separator, advance)
            for answerer in blends:
                if answerer.name in reading:
                    with progress(None, self.console, "scoring") as advance:
                        answerer.compute("scores", question_set.chunks, self.separator, advance)
                if answerer.has_seams:
                    with progress(None, self.console, "joining") as advance:
                        answerer.compute("seams", question_set.chunks, self.separator, advance)
        except NoAnswer as error:
            raise ValueError(f"{answerer.name}: {error}") from error

    def ask(
        self,
        question_set: QuestionSet,
        variants: Sequence[Variant],
        max_tokens: int,
        reference: Variant | None,
        compares_only: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> tuple[list[Attempt], bool]:
        """The attempts, and whether they were interrupted. Says so at the first question when full prefill's answer is
        cut.
        """
        attempts: list[Attempt] = []
        asking = Asking(self.separator, max_tokens, reference, compares_only)
        num_questions = len(question_set.questions if numbers is None else numbers)
        with progress(len(variants) * num_questions, self.console, "asking") as advance:

            def on_attempt(attempt: Attempt) -> None:
                attempts.append(attempt)
                advance()
                if len(attempts) == 1 and reference and attempt.answer and not attempt.answer.is_complete:
                    self.console.print(
                        f"The first answer of {reference.label} doesn't end within {max_tokens} tokens. Answers that "
                        "are cut are scored and compared as far as they go; --max-tokens allows longer ones.",
                        soft_wrap=True,
                    )

            try:
                ask_all(question_set, variants, self.answerers, asking, on_attempt, numbers)
            except KeyboardInterrupt:
                return attempts, True
        return attempts, False


def nothing_reused(attempts: Sequence[Attempt], separator: str) -> str:
    """Says so where blends were asked and no token came from a chunk, so that all figures are full prefill's; else
    empty.
    """
    reuses = [one.answer.reuse for one in attempts if one.variant.policy and one.answer and one.answer.reuse]
    if not reuses or any(reuse.num_reused_tokens + reuse.num_recomputed_tokens for reuse in reuses):
        return ""
    return (
        "No chunk was found again in a prompt, so nothing was reused and nothing compared: "
        f"the separator {separator!r} may have other tokens between these texts, or the chunks may be too short. "
        "--separator takes another one."
    )
