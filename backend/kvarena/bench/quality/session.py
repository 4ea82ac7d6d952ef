"""The contenders of one measurement: found, warmed, asked with progress, and closed.

They are servers by address, services of the running stack by name, or engines in this process (`hf_answerer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from kvarena.bench.console import counted_progress, progress
from kvarena.bench.quality.asking import Answerer, Asking, Attempt, ComputeContexts, NoAnswer, ask_all
from kvarena.bench.quality.http_answerer import HTTPAnswerer
from kvarena.bench.quality.questions import QuestionSet
from kvarena.bench.variants import Variant, blend_variants, find_reference, reads_scores
from kvarena.documents import FALLBACK_SEPARATOR
from kvarena.home import Home
from kvarena.model import find_model
from kvarena.stack.record import read_record
from kvarena.stack.settings import CONTENDERS as STACK_CONTENDERS
from kvarena.stack.settings import shown_api_key


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
    """The documents to ask about where nobody names any: the running stack's, or those that go with the model."""
    record = read_record(Home.find()) if engine == "http" else None
    return Path(record.data_dir) if record else find_model(model, "cpu").data_dir


def _address(given: str, running: dict[str, str]) -> tuple[str, str]:
    name, _, url = given.partition("=")
    if url:
        return name, url if "://" in url else f"http://{url}"
    if name not in running:
        raise ValueError(
            f"{name} isn't running; running: {', '.join(running) or 'nothing'}. "
            "Start it with ./run-server.sh --contenders, or give its address: --contender name=address"
        )
    return name, running[name]


@dataclass(frozen=True)
class ContenderOptions:
    """Whom to ask. `engine` is `http` (servers) or `hf` (in this process, on `model`); what is None has a default.

    `more_sinks` are to be had beside the model's own; with `hf` only. `store_gb` is for the chunks of each.
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


@dataclass(frozen=True)
class Session:
    """`separator` goes between the chunks of every contender's prompts."""

    answerers: Mapping[str, Answerer]
    separator: str
    console: Console

    def variants(self, policies: Sequence[str], ratios: Sequence[float], check_layers: Sequence[int]) -> list[Variant]:
        """All choices for those that blend, one variant for those that don't; full prefill is always among them."""
        variants: list[Variant] = []
        for answerer in self.answerers.values():
            blends = blend_variants(answerer.name, policies, ratios, check_layers) if answerer.is_blend else None
            variants += blends or [Variant(answerer.name)]
        blend = next((answerer.name for answerer in self.answerers.values() if answerer.is_blend), None)
        if blend and find_reference(variants) is None:
            variants.insert(0, Variant(blend, "all"))
        return variants

    def warm(self, question_set: QuestionSet, variants: Sequence[Variant]) -> None:
        """Whatever these variants reuse. Raises `ValueError` when a chunk can't be had ready."""
        reading = {own.contender for own in variants if reads_scores(own.policy)}
        blends = [answerer for answerer in self.answerers.values() if answerer.is_blend]
        with progress(len(blends) * len(question_set.chunks), self.console, "warming") as advance:
            for answerer in blends:
                try:
                    answerer.warm(question_set.chunks, self.separator, advance)
                except NoAnswer as error:
                    raise ValueError(f"{answerer.name}: {error}") from error
        for answerer in blends:
            if answerer.name in reading:
                self._compute_contexts(answerer, "scoring", answerer.score, question_set)
            if answerer.has_seams:
                self._compute_contexts(answerer, "joining", answerer.make_seams, question_set)

    def _compute_contexts(
        self, answerer: Answerer, what: str, compute: ComputeContexts, question_set: QuestionSet
    ) -> None:
        with counted_progress(self.console, what) as on_prompt:
            try:
                compute(question_set.chunks, self.separator, on_prompt)
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
        """What came of it, and whether it was interrupted. Says at the first question when full prefill doesn't end."""
        attempts: list[Attempt] = []
        asking = Asking(self.separator, max_tokens, reference, compares_only)
        num_questions = len(question_set.questions if numbers is None else numbers)
        with progress(len(variants) * num_questions, self.console, "asking") as advance:

            def on_attempt(attempt: Attempt) -> None:
                attempts.append(attempt)
                advance()
                if len(attempts) == 1 and reference and attempt.answer and not attempt.answer.is_complete:
                    self.console.print(cut_note(reference, max_tokens), soft_wrap=True)

            try:
                ask_all(question_set, variants, self.answerers, asking, on_attempt, numbers)
            except KeyboardInterrupt:
                return attempts, True
        return attempts, False


def reuses_nothing(attempts: Sequence[Attempt]) -> bool:
    """Whether blends were asked, and no token came from a chunk: all figures are full prefill's."""
    reuses = [one.answer.reuse for one in attempts if one.variant.policy and one.answer and one.answer.reuse]
    return bool(reuses) and not any(reuse.num_reused_tokens + reuse.num_recomputed_tokens for reuse in reuses)


def nothing_reused_note(separator: str) -> str:
    return (
        "No chunk was found again in a prompt, so nothing was reused and nothing compared: "
        f"the separator {separator!r} may have other tokens between these texts, or the chunks may be too short. "
        "--separator takes another one."
    )


def cut_note(reference: Variant, max_tokens: int) -> str:
    return (
        f"The first answer of {reference.label} doesn't end within {max_tokens} tokens. "
        "Answers that are cut are scored and compared as far as they go; --max-tokens allows longer ones."
    )


@contextmanager
def session(wanted: ContenderOptions, console: Console) -> Iterator[Session]:
    with console.status("Looking for the contenders ..."):
        answerers = wanted.find()
    blends_first = sorted(answerers.values(), key=lambda answerer: not answerer.is_blend)
    known = [wanted.separator, *(answerer.separator for answerer in blends_first)]
    separator = next((given for given in known if given is not None), FALLBACK_SEPARATOR)
    try:
        yield Session(answerers, separator, console)
    finally:
        for answerer in answerers.values():
            answerer.close()
