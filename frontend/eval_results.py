"""Result files, read and checked; of `kvarena eval` as data: how well each variant did, and every single answer.

Reads and checks; draws nothing and knows nothing of Streamlit. A figure that the file doesn't have is None, never 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvarena.panels.kinds import EVAL, panels_of
from kvarena.panels.panel import ALL_KINDS
from kvarena.panels.quality import METRICS

ALL_QUESTIONS = "all"
FIGURES = (*METRICS, "correct_vs_reference", "exact_match_vs_reference")
"""The groups of figures of a row that have an interval."""
SUBSETS = (ALL_QUESTIONS, "answered")
"""All questions, and those that full prefill answers right."""


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Variant:
    """A contender and how it was asked. The next three are None where it doesn't blend.

    `options` are those of the policy, such as "deviation values".
    """

    contender: str
    policy: str | None = None
    ratio: float | None = None
    check_layer: int | None = None
    options: str = ""

    @property
    def policy_name(self) -> str:
        return f"{self.policy or ''}{self.options and f' ({self.options})'}"

    @property
    def label(self) -> str:
        """As a result's settings name it."""
        parts = [self.contender, self.policy_name, None if self.ratio is None else f"{100 * self.ratio:g} %"]
        parts.append(None if self.check_layer is None else f"@{self.check_layer}")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Row:
    """How a variant did on the questions of one kind, or on all of them; of one of `SUBSETS`.

    `metrics` has those of `FIGURES` that the file has. `reused_ratio` is the share of the prompt that wasn't computed.
    """

    variant: Variant
    kind: str
    num_questions: int
    num_failed: int
    num_cut: int
    metrics: Mapping[str, Interval]
    ttft_median_ms: float | None
    ttft_p95_ms: float | None
    reused_ratio: float | None
    subset: str = ALL_QUESTIONS


@dataclass(frozen=True)
class EvalAnswer:
    """`outcome` is answered or failed, in older files unparsed too; `detail` says why it failed."""

    text: str
    outcome: str
    correct: float | None
    exact_match: float | None
    detail: str
    is_complete: bool = True
    ttft_ms: float | None = None


@dataclass(frozen=True)
class Question:
    text: str
    gold: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class EvalResult:
    """`answers` is by variant and by the question's place in `questions`; single ones may be missing.

    `reference` is what the others are compared with, as a rule plain vLLM; else a blend that recomputes everything.
    """

    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    reference: Variant | None
    rows: tuple[Row, ...]
    questions: tuple[Question, ...] = ()
    answers: Mapping[tuple[Variant, int], EvalAnswer] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """In the order of the file, `all` first."""
        return sorted(dict.fromkeys(row.kind for row in self.rows), key=lambda kind: kind != ALL_KINDS)

    @property
    def variants(self) -> list[Variant]:
        return list(dict.fromkeys(row.variant for row in self.rows))

    @property
    def subsets(self) -> list[str]:
        """Those that the file has rows of."""
        found = {row.subset for row in self.rows}
        return [subset for subset in SUBSETS if subset in found]

    def rows_of(self, kind: str, subset: str = ALL_QUESTIONS) -> list[Row]:
        return [row for row in self.rows if row.kind == kind and row.subset == subset]


def read_result(text: str) -> dict[str, Any]:
    """A result file of any kind. Raises `ValueError` saying what it is or lacks."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise ValueError("it has no settings, so it is no result file")
    rows = found.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it has no list of rows")
    if found["settings"].get("benchmark") == EVAL:
        read_eval(found)
    if not rows:
        raise ValueError("rows is empty: nothing was measured")
    panels_of(found)
    return found


def read_eval(found: Mapping[str, Any]) -> EvalResult:
    """Raises `ValueError` for what lacks what it should have."""
    try:
        return _read(found)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"a value has the wrong type: {error}") from error


def _read(found: Mapping[str, Any]) -> EvalResult:
    rows = tuple(_row(entry) for entry in found["rows"])
    if not rows:
        raise ValueError("rows is empty")
    reference = found["settings"].get("reference")
    return EvalResult(
        settings=found["settings"],
        machine=found.get("machine") or {},
        reference=next((row.variant for row in rows if row.variant.label == reference), None),
        rows=rows,
        questions=tuple(_question(entry) for entry in found.get("questions") or ()),
        answers={(_variant(entry), int(entry["question"])): _answer(entry) for entry in found.get("answers") or ()},
    )


def _variant(entry: Mapping[str, Any]) -> Variant:
    options = ", ".join(f"{name} {value}" for name, value in (entry.get("options") or {}).items())
    ratio = _number(entry.get("ratio"))
    return Variant(entry["contender"], entry.get("policy"), ratio, entry.get("check_layer"), options)


def _row(entry: Mapping[str, Any]) -> Row:
    ttft_ms = entry.get("ttft_ms") or {}
    return Row(
        variant=_variant(entry),
        kind=entry["kind"],
        num_questions=int(entry["num_questions"]),
        num_failed=int(entry["num_failed"]),
        num_cut=int(entry["num_cut"] if "num_cut" in entry else entry["num_unparsed"]),
        metrics={name: found for name in FIGURES if (found := _interval(entry.get(name)))},
        ttft_median_ms=_number(ttft_ms.get("median")),
        ttft_p95_ms=_number(ttft_ms.get("p95")),
        reused_ratio=_number(entry.get("reused_ratio")),
        subset=entry.get("subset") or ALL_QUESTIONS,
    )


def _answer(entry: Mapping[str, Any]) -> EvalAnswer:
    return EvalAnswer(
        text=entry.get("text") or "",
        outcome=entry["outcome"],
        correct=_number(entry.get("correct")),
        exact_match=_number(entry.get("exact_match")),
        detail=entry.get("detail") or "",
        is_complete=entry.get("is_complete") is not False,
        ttft_ms=_number(entry.get("ttft_ms")),
    )


def _question(entry: Mapping[str, Any]) -> Question:
    return Question(entry["question"], tuple(entry["answers"]), entry["kind"])


def _interval(group: Mapping[str, Any] | None) -> Interval | None:
    numbers = [_number(group[key]) for key in ("mean", "low", "high")] if group else []
    mean, low, high = numbers or (None, None, None)
    return None if mean is None or low is None or high is None else Interval(mean, low, high)


def _number(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is None or math.isfinite(number) else None
