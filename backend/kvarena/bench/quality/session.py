"""The contenders of one measurement: looked for, warmed, asked, with progress, and let go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from kvarena.bench.console import progress
from kvarena.bench.openai_server import NoAnswer
from kvarena.bench.quality import contenders
from kvarena.bench.quality.answers import Answerer
from kvarena.bench.quality.asking import Asking, Attempt, ask_all
from kvarena.bench.quality.questions import Exam
from kvarena.bench.quality.setups import Setup, blend_setups, find_reference

FALLBACK_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Wanted:
    """Whom to ask. `engine` is `http` (servers) or `hf` (in this process, on `model`); what is None has a default."""

    engine: str = "http"
    contenders: Sequence[str] = ()
    model: str | None = None
    separator: str | None = None
    timeout_s: float = 120.0
    has_logprobs: bool = True
    store_gb: float = 2.0

    def find(self) -> dict[str, Answerer]:
        """Raises `ValueError` or `OSError` for what isn't there."""
        if self.engine == "hf":
            return contenders.engines(self.contenders, self.model, self.separator, self.store_gb)
        if self.engine != "http":
            raise ValueError(f"engine is {self.engine!r}; it is http or hf")
        if self.model:
            raise ValueError("servers have a model already; --model goes with --engine hf")
        return contenders.servers(self.contenders, self.timeout_s, self.has_logprobs)


@dataclass(frozen=True)
class Session:
    """`separator` goes between the chunks of every contender's prompts."""

    answerers: Mapping[str, Answerer]
    separator: str
    console: Console

    def setups(self, policies: Sequence[str], ratios: Sequence[float], check_layers: Sequence[int]) -> list[Setup]:
        """All choices for those that blend, one setup for those that don't; full prefill is always among them."""
        setups: list[Setup] = []
        for answerer in self.answerers.values():
            blends = blend_setups(answerer.name, policies, ratios, check_layers) if answerer.is_blend else None
            setups += blends or [Setup(answerer.name)]
        blend = next((answerer.name for answerer in self.answerers.values() if answerer.is_blend), None)
        if blend and find_reference(setups) is None:
            setups.insert(0, Setup(blend, "all"))
        return setups

    def warm(self, exam: Exam) -> None:
        """Raises `ValueError` when a chunk can't be had ready."""
        blends = [answerer for answerer in self.answerers.values() if answerer.is_blend]
        with progress(len(blends) * len(exam.chunks), self.console, "warming") as advance:
            for answerer in blends:
                try:
                    answerer.warm(exam.chunks, self.separator, advance)
                except NoAnswer as error:
                    raise ValueError(f"{answerer.name}: {error}") from error

    def ask(
        self,
        exam: Exam,
        setups: Sequence[Setup],
        max_tokens: int,
        reference: Setup | None,
        compares_only: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> tuple[list[Attempt], bool]:
        """What came of it, and whether it was interrupted. Says at the first question when full prefill doesn't end."""
        attempts: list[Attempt] = []
        asking = Asking(self.separator, max_tokens, reference, compares_only)
        num_questions = len(exam.questions if numbers is None else numbers)
        with progress(len(setups) * num_questions, self.console, "asking") as advance:

            def on_attempt(attempt: Attempt) -> None:
                attempts.append(attempt)
                advance()
                if len(attempts) == 1 and reference and attempt.answer and not attempt.answer.is_complete:
                    self.console.print(cut_note(reference, max_tokens), soft_wrap=True)

            try:
                ask_all(exam, setups, self.answerers, asking, on_attempt, numbers)
            except KeyboardInterrupt:
                return attempts, True
        return attempts, False


def reuses_nothing(attempts: Sequence[Attempt]) -> bool:
    """Whether blends were asked, and no token came from a chunk: all figures are full prefill's."""
    reuses = [one.answer.reuse for one in attempts if one.setup.policy and one.answer and one.answer.reuse]
    return bool(reuses) and not any(reuse.num_reused_tokens + reuse.num_recomputed_tokens for reuse in reuses)


def nothing_reused_note(separator: str) -> str:
    return (
        "No chunk was found again in a prompt, so nothing was reused and nothing compared: "
        f"the separator {separator!r} may have other tokens between these texts, or the chunks may be too short. "
        "--separator takes another one."
    )


def cut_note(reference: Setup, max_tokens: int) -> str:
    return (
        f"The first answer of {reference.label} doesn't end within {max_tokens} tokens. "
        "Answers that are cut are scored and compared as far as they go; --max-tokens allows longer ones."
    )


@contextmanager
def session(wanted: Wanted, console: Console) -> Iterator[Session]:
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
