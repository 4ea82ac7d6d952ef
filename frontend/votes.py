"""What blind votes say together: how often each setting's answer is preferred, with an interval. Data only.

A setting is a contender with the policy and share, or the mode, that it answered with. Votes are counted by Luce's
choice model, which for two sides is that of Bradley and Terry: an answer of strength p is preferred with probability p
divided by the sum of the strengths shown. A tie or "all bad" counts as an equal part of a vote for each side, as in
Chatbot Arena (arXiv 2403.04132).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from chat import Answer, Chat, Turn

Floats = npt.NDArray[np.float64]
Z = 1.96  # of a 95 % interval
PRIOR_VOTES = 1.0
"""One more tie for all settings that were shown together: without it a side that won every vote has no finite strength.
For two sides the interval is then Gart's (Biometrika 53, 1966), with half a vote added to each."""
MAX_STEPS = 10_000


@dataclass(frozen=True)
class Ballot:
    """`best` is one of the `sides`, which are settings in alphabetical order; empty for a tie and for `bad`."""

    sides: tuple[str, ...]
    kind: Literal["best", "tie", "bad"]
    best: str = ""


@dataclass(frozen=True)
class Standing:
    """Of one setting among those that it met, directly or through others. `share` is the probability that its answer is
    preferred to the average rival's, `low` and `high` the ends of its 95 % interval.
    """

    setting: str
    num_votes: int
    num_best: int
    num_ties: int
    num_bad: int
    share: float
    low: float
    high: float


def setting_of(answer: Answer) -> str:
    return ", ".join(filter(None, (answer.contender.title, answer.figures.setting)))


def ballot_of(turn: Turn) -> Ballot | None:
    """None without a vote, or if two sides are the same setting."""
    settings = {name: setting_of(answer) for name, answer in turn.answers.items()}
    if turn.vote is None or len(set(settings.values())) < len(settings):
        return None
    return Ballot(tuple(sorted(settings.values())), turn.vote.kind, settings.get(turn.vote.best, ""))


def ballots_of(chat: Chat) -> list[Ballot]:
    return [ballot for turn in chat.turns if (ballot := ballot_of(turn))]


def standings(ballots: Sequence[Ballot]) -> list[list[Standing]]:
    """A list for each group of settings that met, the most preferred first."""
    return [_standings([ballot for ballot in ballots if ballot.sides[0] in group]) for group in _groups(ballots)]


def _groups(ballots: Sequence[Ballot]) -> list[set[str]]:
    groups: list[set[str]] = []
    for sides in sorted({ballot.sides for ballot in ballots}):
        met = [group for group in groups if group.intersection(sides)]
        groups = [*(group for group in groups if group not in met), set(sides).union(*met)]
    return groups


def _standings(ballots: Sequence[Ballot]) -> list[Standing]:
    settings = sorted({side for ballot in ballots for side in ballot.sides})
    choices = Counter({(ballot.sides, ""): PRIOR_VOTES for ballot in ballots})
    choices.update((ballot.sides, ballot.best) for ballot in ballots)
    model = fit(choices, settings)
    found = [
        Standing(setting, *_counts(ballots, setting), float(share), float(low), float(high))
        for setting, share, low, high in zip(settings, *model, strict=True)
    ]
    return sorted(found, key=lambda one: -one.share)


def _counts(ballots: Sequence[Ballot], setting: str) -> tuple[int, int, int, int]:
    own = [ballot for ballot in ballots if setting in ballot.sides]
    kinds = Counter(ballot.kind for ballot in own)
    return len(own), sum(ballot.best == setting for ballot in own), kinds["tie"], kinds["bad"]


def fit(choices: Mapping[tuple[tuple[str, ...], str], float], settings: Sequence[str]) -> tuple[Floats, Floats, Floats]:
    """Each setting's share, low and high, `(S,)` each, from how often which of the sides was chosen (empty: none).

    The strengths that make the votes likeliest, by the MM iteration of D. R. Hunter, "MM algorithms for generalized
    Bradley-Terry models" (Annals of Statistics 32, 2004, doi 10.1214/aos/1079120141), sections 2 and 5. The interval is
    on the logarithm of the odds, from the Fisher information there.
    """
    shown = np.array([[setting in sides for setting in settings] for sides, _ in choices], float)  # (B, S)
    number = np.array(list(choices.values()))[:, None]  # (B, 1)
    chosen = np.array([[setting == best for setting in settings] for _, best in choices], float)
    undecided = np.array([[not best] for _, best in choices]) * shown / shown.sum(1, keepdims=True)
    wins = (number * (chosen + undecided)).sum(0)  # (S,)
    strengths = np.full(len(settings), 1 / len(settings))
    for _ in range(MAX_STEPS):
        before = strengths
        strengths = wins / (number * shown / (shown @ before)[:, None]).sum(0)
        strengths = strengths / strengths.sum()
        if np.allclose(strengths, before, rtol=1e-10, atol=0):
            break
    expected = shown * strengths / (shown @ strengths)[:, None]  # (B, S)
    information = np.diag((number * expected).sum(0)) - (number * expected).T @ expected
    against_rivals = (np.eye(len(settings)) * len(settings) - 1) / (len(settings) - 1)
    log_odds = against_rivals @ np.log(strengths)
    error = Z * np.sqrt(np.diag(against_rivals @ np.linalg.pinv(information) @ against_rivals.T))
    return _share(log_odds), _share(log_odds - error), _share(log_odds + error)


def _share(log_odds: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-log_odds)))
