"""What a chat's turns say together: how much sooner first tokens came, and how often the answers agreed.

Each contender is compared with the exact one, turn by turn. A repeated prompt is no fair race: where the exact
contender or the other had most of it in vLLM's prefix cache, the turn's times are left out, unless there are no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Literal

from chat import Answer, Turn
from figures import format_factor
from tokens import first_difference

Tone = Literal["gain", "tie", "loss"]
MIN_GAIN = 1.1
"""Smaller gains than this are a tie: they come and go from one run to the next."""
CACHED_RATIO = 0.5
FindMeasured = Callable[[Answer], str]
"""What was measured over context lengths with an answer's contender and setting; empty: nothing."""


@dataclass(frozen=True)
class Sample:
    """One turn, of two contenders. `speedup` is the exact one's time to first token by the other's. `is_drawn`: at a
    temperature, where equal ways give different answers, too.
    """

    num_tokens: int
    speedup: float
    agrees: bool | None
    is_fresh: bool
    is_drawn: bool = False


@dataclass(frozen=True)
class Verdict:
    """Of one contender against `reference`; `samples` has at least one. `agrees` None: an answer was cut short, or the
    answers are drawn. `measured` says from what length on it pays, if that was measured.
    """

    title: str
    reference: str
    samples: tuple[Sample, ...]
    measured: str = ""

    @property
    def timed(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.is_fresh] or list(self.samples)

    @property
    def speedup(self) -> float:
        return median(sample.speedup for sample in self.timed)

    @property
    def colour(self) -> Tone:
        """Grey too where no prompt was fresh: a repeated one proves nothing."""
        return self.tone if any(sample.is_fresh for sample in self.samples) else "tie"

    @property
    def tone(self) -> Tone:
        return "gain" if self.speedup >= MIN_GAIN else "loss" if self.speedup <= 1 / MIN_GAIN else "tie"

    @property
    def compared(self) -> list[bool]:
        return [sample.agrees for sample in self.samples if sample.agrees is not None]

    @property
    def differs(self) -> bool:
        return not all(self.compared)

    def speed_text(self) -> str:
        timed = self.timed
        prompts = "one prompt only" if len(timed) == 1 else f"median of {len(timed)} prompts"
        if self.tone == "tie":
            speed = f"{self.title} and {self.reference} are equally fast to the first token"
        elif self.tone == "gain":
            speed = f"{self.title}: first token {format_factor(self.speedup)} times sooner than {self.reference}"
        else:
            speed = f"{self.title}: first token {format_factor(1 / self.speedup)} times later than {self.reference}"
        return f"{speed} ({prompts})"

    def agreement_text(self) -> str:
        compared = self.compared
        if not compared:
            drawn = any(sample.is_drawn for sample in self.samples)
            return "answers drawn at a temperature aren't compared" if drawn else "no whole answers to compare"
        if len(compared) == 1:
            return "the answers differ" if self.differs else "the answers agree"
        if not self.differs:
            return "both answers agree" if len(compared) == 2 else f"all {len(compared)} answers agree"
        return f"the answers differ: {sum(compared)} of {len(compared)} agree"

    def notes(self) -> list[str]:
        """From what length on it pays, and what the times don't count."""
        repeated = sum(not sample.is_fresh for sample in self.samples)
        measured = [self.measured] if self.measured else []
        if repeated == len(self.samples):
            return [*measured, "Not a fresh prompt: most of it was in a prefix cache."]
        told = measured or ([length] if (length := self.length_text()) else [])
        if repeated:
            told.append(f"{repeated} repeated prompt{'s' * (repeated > 1)} not timed: most was in a prefix cache.")
        return told

    def length_text(self) -> str:
        """By the prompts that were asked; empty while all of them are about as long."""
        by_length = sorted(self.timed, key=lambda sample: sample.num_tokens)
        shortest, longest = by_length[0].num_tokens, by_length[-1].num_tokens
        if longest < 1.5 * shortest:
            return ""
        paying = None
        for sample in reversed(by_length):
            if sample.speedup < MIN_GAIN:
                break
            paying = sample.num_tokens
        asked = f"of the lengths asked, {shortest:,} to {longest:,} tokens"
        if paying is None:
            return f"It doesn't pay at the longest {asked}."
        return f"It pays at all {asked}." if paying == shortest else f"It pays from {paying:,} tokens on, {asked}."


def verdicts(turns: Sequence[Turn], measured: FindMeasured = lambda answer: "") -> list[Verdict]:
    """One for each contender and its settings that was asked together with an exact one, in the order of asking."""
    found: dict[tuple[str, str, str], list[Sample]] = {}
    latest: dict[tuple[str, str, str], Answer] = {}
    for turn in turns:
        reference = exact_answer(turn)
        if not reference or reference.contender.approximate:
            continue
        for answer in turn.answers.values():
            if answer is not reference and (sample := _sample(answer, reference, turn.sampling.temperature > 0)):
                key = (answer.contender.title, answer.figures.setting, reference.contender.title)
                found.setdefault(key, []).append(sample)
                latest[key] = answer
    return [
        Verdict(f"{key[0]}{key[1] and f', {key[1]}'}", key[2], tuple(samples), measured(latest[key]))
        for key, samples in found.items()
    ]


def exact_answer(turn: Turn) -> Answer | None:
    """That all others are compared with: the first whole one that is exact, of a contender that always is if there is
    one.
    """
    exact = (a for a in turn.answers.values() if a.state == "done" and a.figures.approximate is False)
    return min(exact, key=lambda answer: answer.contender.approximate, default=None)


def _sample(answer: Answer, reference: Answer, is_drawn: bool) -> Sample | None:
    ours, theirs = answer.figures, reference.figures
    if ours.first_token_ms is None or theirs.first_token_ms is None:
        return None
    whole = answer.state == reference.state == "done"
    num_tokens = theirs.num_prompt_tokens or 0
    return Sample(
        num_tokens,
        theirs.first_token_ms / max(ours.first_token_ms, 1e-9),
        first_difference(answer.text, reference.text) is None if whole and not is_drawn else None,
        is_fresh=not _had_it_cached(reference) and not (answer.contender.approximate and _had_it_cached(answer)),
        is_drawn=is_drawn,
    )


def _had_it_cached(answer: Answer) -> bool:
    """Most of the prompt, in vLLM's own prefix cache."""
    return (answer.figures.num_prefix_tokens or 0) > CACHED_RATIO * (answer.figures.num_prompt_tokens or 0)


def verdict_html(turns: Sequence[Turn], measured: FindMeasured = lambda answer: "") -> str:
    """Speed and agreement in letters of one size: neither is read without the other."""
    return "".join(_line_html(verdict) for verdict in verdicts(turns, measured))


def _line_html(verdict: Verdict) -> str:
    notes = "".join(f"<small>{escape(note)}</small>" for note in verdict.notes())
    agreement = "differs" if verdict.differs else "agrees" if verdict.compared else "tie"
    return (
        f'<div class="ka-verdict" data-testid="verdict" data-tone="{verdict.colour}" '
        f'data-speedup="{verdict.speedup:.4f}" data-agreement="{agreement}">'
        f'<b class="ka-tone-{verdict.colour}">{escape(verdict.speed_text())}</b>'
        f'<b class="ka-tone-{agreement}">{escape(verdict.agreement_text())}</b>{notes}</div>'
    )
