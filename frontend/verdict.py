"""What a chat's turns say together: how much faster first tokens came, and how often the answers agreed.

Each contender is compared with the exact one, turn by turn. Times are left out if they say nothing of reuse: most of
the prompt was in vLLM's prefix cache, on either side, as for a follow-up; or nothing was reused, and it was faster
anyway. Answers are left out if the earlier ones that they follow on from differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from chat import Answer, Chat, Turn
from figures import Figures, Tone, format_factor
from tokens import first_difference

SAME_PROMPT_RATIO = 0.5
MIN_GAIN = 1.1
"""Less is a tie: it is noise between runs."""
FindMeasured = Callable[[Answer], str]
"""Says what was measured over context lengths with an answer's contender and setting; empty if nothing was."""


@dataclass(frozen=True)
class Sample:
    """One turn of two contenders. `speedup` is the exact one's time to first token divided by the other's. `is_cached`:
    most of the prompt was in a prefix cache. `is_drawn`: at a temperature, where equal methods give different answers
    too. `follows_others`: the earlier answers differ. `is_late`: after the time that it was given.
    """

    num_tokens: int
    speedup: float
    agrees: bool | None
    is_cached: bool = False
    reuses: bool = True
    is_drawn: bool = False
    follows_others: bool = False
    is_late: bool = False

    @property
    def is_timed(self) -> bool:
        return not self.is_cached and (self.reuses or self.speedup < MIN_GAIN)


@dataclass(frozen=True)
class Verdict:
    """Of one contender against `reference`; `samples` has at least one. `agrees` None: an answer was cut short, drawn
    at a temperature, or had another history. `measured` says from which length on it pays, if that was measured.
    """

    title: str
    reference: str
    samples: tuple[Sample, ...]
    measured: str = ""

    @property
    def timed(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.is_timed]

    @property
    def speedup(self) -> float | None:
        """The median; None if no time means anything."""
        return median(sample.speedup for sample in self.timed) if self.timed else None

    @property
    def tone(self) -> Tone:
        if self.speedup is None:
            return "tie"
        return "gain" if self.speedup >= MIN_GAIN else "loss" if self.speedup <= 1 / MIN_GAIN else "tie"

    @property
    def leaves_lengths_open(self) -> bool:
        """Whether times were compared, but only of prompts of about one length, and nothing else was measured."""
        return bool(self.timed) and not self.measured and not self.length_text()

    @property
    def compared(self) -> list[bool]:
        return [sample.agrees for sample in self.samples if sample.agrees is not None]

    @property
    def differs(self) -> bool:
        return not all(self.compared)

    def speed_text(self) -> str:
        if self.speedup is None:
            return f"{self.title}: no first token that could be compared with {self.reference}'s"
        prompts = "one prompt only" if len(self.timed) == 1 else f"median of {_prompts(len(self.timed))}"
        if self.tone == "tie":
            speed = f"{self.title} and {self.reference} are equally fast to the first token"
        else:
            speed = f"{self.title}: {self._times(self.speedup)} to the first token than {self.reference}"
        return f"{speed} ({prompts})"

    def short_speed_text(self) -> str:
        if self.speedup is None:
            return f"{self.title}: not timed"
        speed = "equally fast" if self.tone == "tie" else self._times(self.speedup)
        return f"{self.title}: {speed} ({_prompts(len(self.timed))})"

    def _times(self, speedup: float) -> str:
        if self.tone == "gain":
            return f"{format_factor(speedup)} times faster"
        return f"{format_factor(1 / speedup)} times slower"

    def agreement_text(self) -> str:
        compared = self.compared
        if not compared:
            if any(sample.is_drawn for sample in self.samples):
                return "answers drawn at a temperature aren't compared"
            follows = any(sample.follows_others for sample in self.samples)
            return "answers to different histories aren't compared" if follows else "no whole answers to compare"
        if len(compared) == 1:
            return "the answers differ" if self.differs else "the answers agree"
        if not self.differs:
            return "both answers agree" if len(compared) == 2 else f"all {len(compared)} answers agree"
        return f"the answers differ: {sum(compared)} of {len(compared)} agree"

    def notes(self) -> list[str]:
        """From which length on it pays, and which times and answers don't count."""
        told = [self.measured] if self.measured else [length] if (length := self.length_text()) else []
        late = sum(sample.is_late for sample in self.samples)
        if late:
            told.append(f"{late} of {len(self.samples)} first tokens came after the time that was given.")
        cached = sum(sample.is_cached for sample in self.samples)
        if cached:
            told.append(f"{_prompts(cached)} not timed: most was in a prefix cache, from an earlier prompt.")
        unused = sum(not sample.is_timed and not sample.is_cached for sample in self.samples)
        if unused:
            told.append(f"{_prompts(unused)} not timed: nothing was reused, so other work made the difference.")
        followed = sum(sample.follows_others for sample in self.samples)
        if followed and self.compared:
            told.append(f"{followed} answer{'s' * (followed > 1)} not compared: earlier answers already differed.")
        return told

    def length_text(self) -> str:
        """From the prompts that were asked; empty if all are about as long."""
        by_length = sorted(self.timed, key=lambda sample: sample.num_tokens)
        if not by_length:
            return ""
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
    """One for each contender and setting that was asked together with an exact one, in the order of asking."""
    found: dict[tuple[str, str, str], list[Sample]] = {}
    latest: dict[tuple[str, str, str], Answer] = {}
    chat = Chat(turns=list(turns))
    for index, turn in enumerate(turns):
        reference = exact_answer(turn)
        if turn.is_blind or not reference or reference.contender.approximate:
            continue
        earlier = chat.followed(index)
        for answer in turn.answers.values():
            if answer is not reference and (sample := _sample(answer, reference, turn, earlier)):
                key = (answer.contender.title, answer.figures.setting, reference.contender.title)
                found.setdefault(key, []).append(sample)
                latest[key] = answer
    return [
        Verdict(f"{key[0]}{key[1] and f', {key[1]}'}", key[2], tuple(samples), measured(latest[key]))
        for key, samples in found.items()
    ]


def exact_answer(turn: Turn) -> Answer | None:
    """What all others are compared with: the first complete exact answer, preferably of a contender that is always
    exact.
    """
    exact = (a for a in turn.answers.values() if a.state == "done" and a.figures.approximate is False)
    return min(exact, key=lambda answer: answer.contender.approximate, default=None)


def _sample(answer: Answer, reference: Answer, turn: Turn, earlier: Sequence[Turn]) -> Sample | None:
    """`earlier`: the turns that this one follows on from."""
    ours, theirs = answer.figures, reference.figures
    if ours.first_token_ms is None or theirs.first_token_ms is None or _has_other_prompt(ours, theirs):
        return None
    is_drawn = turn.sampling.temperature > 0
    follows_others = any(_said(one, answer) != _said(one, reference) for one in earlier)
    return Sample(
        theirs.num_prompt_tokens or 0,
        theirs.first_token_ms / max(ours.first_token_ms, 1e-9),
        (
            first_difference(answer.text, reference.text) is None
            if are_comparable(answer, reference, turn, earlier)
            else None
        ),
        is_cached=theirs.is_mostly_cached or (answer.contender.approximate and ours.is_mostly_cached),
        reuses=not answer.contender.approximate or ours.num_moved_tokens != 0,
        is_drawn=is_drawn,
        follows_others=follows_others,
        is_late=ours.max_ttft_ms is not None and ours.first_token_ms > ours.max_ttft_ms,
    )


def are_comparable(answer: Answer, reference: Answer, turn: Turn, earlier: Sequence[Turn]) -> bool:
    """Whether exact methods would give equal answers: complete ones to the same prompt, without sampling. `earlier` are
    the turns that this one follows on from.
    """
    if turn.sampling.temperature > 0 or not answer.state == reference.state == "done":
        return False
    if _has_other_prompt(answer.figures, reference.figures):
        return False
    return all(_said(one, answer) == _said(one, reference) for one in earlier)


def _has_other_prompt(ours: Figures, theirs: Figures) -> bool:
    """One is less than half of the other, as if a slot begins a topic without the conversation's chunks."""
    sizes = sorted(figures.num_prompt_tokens or 0 for figures in (ours, theirs))
    return 0 < sizes[0] < SAME_PROMPT_RATIO * sizes[1]


def _said(turn: Turn, answer: Answer) -> list[str]:
    """The words of the same contender's answer in an earlier turn."""
    earlier = turn.answers.get(answer.contender.name)
    return earlier.text.split() if earlier else []


def _prompts(number: int) -> str:
    return f"{number} prompt{'s' * (number > 1)}"


LENGTHS_OPEN = "To find out from what length on reuse pays, open Measure and choose Context lengths."


def verdict_html(turns: Sequence[Turn], measured: FindMeasured = lambda answer: "") -> str:
    """Speed and agreement in one size: neither should be read without the other."""
    found = verdicts(turns, measured)
    lines = "".join(map(_line_html, found))
    if any(verdict.leaves_lengths_open for verdict in found):
        lines += f'<div class="ka-verdict"><small data-testid="lengths-open">{LENGTHS_OPEN}</small></div>'
    return lines


def _line_html(verdict: Verdict) -> str:
    notes = "".join(f"<small>{escape(note)}</small>" for note in verdict.notes())
    speed, told = escape(verdict.speed_text()), escape(" ".join([verdict.speed_text(), *verdict.notes()]))
    agreement = "differs" if verdict.differs else "agrees" if verdict.compared else "tie"
    return (
        f'<div class="ka-verdict" data-testid="verdict" data-tone="{verdict.tone}" '
        f'data-speedup="{verdict.speedup or 0:.4f}" data-agreement="{agreement}">'
        f'<b class="ka-tone-{verdict.tone}" title="{told}"><span class="ka-long">{speed}</span>'
        f'<span class="ka-short">{escape(verdict.short_speed_text())}</span></b>'
        f'<b class="ka-tone-{agreement}">{escape(verdict.agreement_text())}</b>{notes}</div>'
    )
