"""Result files, read and checked; of an eval also what the pages show beside its charts: tables, answers side by side.

A table is a list of records, one for each of its lines. Draws nothing. A figure that the file lacks is None, never 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvarena.panels.kinds import EVAL, panels_of
from kvarena.panels.panel import ALL_KINDS, Panel, Result, Row, colours_in, policy_label, variant_label
from kvarena.panels.quality import METRICS, rows_with, share_panel

Record = dict[str, Any]
ALL_QUESTIONS = "all"
SUBSETS = (ALL_QUESTIONS, "answered")
"""All questions, and those that full prefill answers right."""
NEW_COLUMNS = ("Right", "vs. full prefill", "Tokens", "KL along answer")
MEASURED_COLUMNS = ("Questions", "Failed", "TTFT median", "TTFT p95", "Agreement", "Right")
MEASURED_METRICS = ("agreement", "correct")
MARKS = {1.0: "✓ ", 0.0: "✗ "}


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


class EvalResult:
    """A file of `kvarena eval`. A variant is a contender and how it was asked, named as in charts and reports.

    `answers` is by variant and index in `questions`; some may be missing. `reference` is the variant that the others
    are compared with: usually plain vLLM, else a blend that recomputes everything.
    """

    def __init__(self, found: Result) -> None:
        self.settings: Mapping[str, Any] = found["settings"]
        self.machine: Mapping[str, Any] = found.get("machine") or {}
        self.rows: Sequence[Row] = found["rows"]
        self.questions: Sequence[Record] = found.get("questions") or ()
        self.answers: Mapping[tuple[str, int], Record] = {
            (variant_label(answer), int(answer["question"])): answer for answer in found.get("answers") or ()
        }
        self.variants = list(dict.fromkeys(map(variant_label, self.rows)))
        named = self.settings.get("reference")
        self.reference = named if named in self.variants else None

    @property
    def kinds(self) -> list[str]:
        """In the order of the file, `all` first."""
        return sorted(dict.fromkeys(row["kind"] for row in self.rows), key=lambda kind: kind != ALL_KINDS)

    @property
    def subsets(self) -> list[str]:
        """Those that the file has rows of."""
        found = set(map(_subset, self.rows))
        return [subset for subset in SUBSETS if subset in found]

    def rows_of(self, kind: str, subset: str = ALL_QUESTIONS) -> list[Row]:
        return [row for row in self.rows if (row["kind"], _subset(row)) == (kind, subset)]


def read_eval(found: Result) -> EvalResult:
    """Checks every figure and answer. Raises `ValueError` for what is missing or has the wrong type."""
    if not found["rows"]:
        raise ValueError("rows is empty")
    try:
        result = EvalResult(found)
        for row in result.rows:
            _table_row(row)
        for kind in result.kinds:
            answer_table(result, kind, result.variants, only_different=True)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"a value has the wrong type: {error}") from error
    return result


def metrics_of(result: EvalResult) -> list[str]:
    """Those that the file has, since older ones lack some; all if it has none."""
    return [metric for metric in METRICS if any(row.get(metric) for row in result.rows)] or list(METRICS)


def table(result: EvalResult, kind: str, subset: str = ALL_QUESTIONS) -> list[Record]:
    """Without the columns of newer figures that this file lacks."""
    records = [_table_row(row) for row in result.rows_of(kind, subset)]
    unknown = [name for name in NEW_COLUMNS if all(record[name] is None for record in records)]
    return [{name: value for name, value in record.items() if name not in unknown} for record in records]


def measured_table(result: EvalResult) -> list[Record]:
    """The figures over all questions that a run is started for."""
    records = []
    for row in result.rows_of(ALL_KINDS):
        figures = _table_row(row)
        shown = {name: figures[name] for name in MEASURED_COLUMNS}
        shown |= {name: round(shown[name]) for name in ("TTFT median", "TTFT p95") if shown[name] is not None}
        records.append({"Variant": variant_label(row), **shown})
    return records


def cached_note(result: EvalResult) -> str:
    """Which variants answered prompts that were asked before from a prefix cache; empty if none did."""
    told = [
        f"{variant_label(row)}: {row['num_cached']} of {row['num_questions']}"
        for row in result.rows_of(ALL_KINDS)
        if row.get("num_cached")
    ]
    if not told:
        return ""
    return f"Prompts that were mostly in a prefix cache, and are fast for that reason: {'; '.join(told)}."


def measured_panels(found: Result) -> list[Panel]:
    """How often the answers were those of full prefill, and how often right, as far as the file has it."""
    of_all, colours = EvalResult(found).rows_of(ALL_KINDS), colours_in([found])
    return [
        share_panel(rows, metric, "all questions", colours)
        for metric in MEASURED_METRICS
        if (rows := rows_with(of_all, metric))
    ]


def times(result: EvalResult) -> list[Record]:
    """Every answer's time to first token; empty for older files."""
    return [
        {"variant": variant, "ttft_ms": ttft_ms, "question": result.questions[index]["question"]}
        for (variant, index), answer in result.answers.items()
        if (ttft_ms := _number(answer.get("ttft_ms"))) is not None
    ]


def summary(result: EvalResult) -> str:
    """What was measured, and where, in one line."""
    settings, machine = result.settings, result.machine
    servers = (settings.get("contenders") or {}).values()
    models = dict.fromkeys(filter(None, [settings.get("model"), *(server.get("model") for server in servers)]))
    parts = [", ".join([*models, f"engine {settings.get('engine', 'unknown')}"])]
    if num_questions := settings.get("num_questions"):
        parts.append(f"{num_questions:,} questions")
    if settings.get("is_interrupted"):
        parts.append("interrupted")
    if result.reference:
        parts.append(f"full prefill: {result.reference}")
    parts += machine.get("gpus") or [f"{machine['cpu']}, {machine.get('num_cores')} cores"] * ("cpu" in machine)
    return " · ".join(parts)


def problems(result: EvalResult, kind: str, subset: str = ALL_QUESTIONS) -> str:
    """How many answers failed; empty if none did."""
    rows = result.rows_of(kind, subset)
    failed = sum(row["num_failed"] for row in rows)
    return f"Of {sum(row['num_questions'] for row in rows):,} answers {failed:,} failed." if failed else ""


def answer_table(result: EvalResult, kind: str, variants: Sequence[str], only_different: bool) -> list[Record]:
    """A line per question of this kind, a column per variant. `only_different`: if one differs from the reference."""
    lines = []
    for index, question in enumerate(result.questions):
        if kind not in (ALL_KINDS, question["kind"]):
            continue
        answers = {variant: result.answers.get((variant, index)) for variant in variants}
        cells = {variant: _cell(answer) for variant, answer in answers.items()}
        if not only_different or any(_differs(result, index, answer) for answer in answers.values()):
            lines.append({"Question": question["question"], "Gold": " / ".join(question["answers"]), **cells})
    return lines


def _subset(row: Row) -> str:
    return str(row.get("subset") or ALL_QUESTIONS)


def _table_row(row: Row) -> Record:
    ttft_ms = row.get("ttft_ms")
    return {
        "Contender": row["contender"],
        "Policy": policy_label(row) or None,
        "Ratio": _number(row.get("ratio")),
        "Check layer": row.get("check_layer"),
        "Questions": int(row["num_questions"]),
        "Failed": int(row["num_failed"]),
        "Cut": int(row["num_cut"] if "num_cut" in row else row["num_unparsed"]),
        "Right": _of(row.get("correct"), "mean"),
        "vs. full prefill": _of(row.get("correct_vs_reference"), "mean"),
        "Exact match": _of(row.get("exact_match"), "mean"),
        "EM low": _of(row.get("exact_match"), "low"),
        "EM high": _of(row.get("exact_match"), "high"),
        "vs. reference": _of(row.get("exact_match_vs_reference"), "mean"),
        "Token F1": _of(row.get("f1"), "mean"),
        "Agreement": _of(row.get("agreement"), "mean"),
        "Tokens": _of(row.get("token_agreement"), "mean"),
        "KL along answer": _of(row.get("kl_along_answer"), "mean"),
        "KL": _of(row.get("first_token_kl"), "mean"),
        "TTFT median": _of(ttft_ms, "median"),
        "TTFT p95": _of(ttft_ms, "p95"),
        "Reused": _number(row.get("reused_ratio")),
    }


def _of(group: Mapping[str, Any] | None, figure: str) -> float | None:
    return _number(group[figure]) if group else None


def _number(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is None or math.isfinite(number) else None


def _differs(result: EvalResult, index: int, answer: Record | None) -> bool:
    reference = result.answers.get((result.reference, index)) if result.reference else None
    if answer is None or reference is None:
        return False
    return (answer["outcome"], _text(answer).strip()) != (reference["outcome"], _text(reference).strip())


def _cell(answer: Record | None) -> str | None:
    """`outcome` is answered or failed, in older files also unparsed."""
    if answer is None:
        return None
    if answer["outcome"] == "failed":
        return f"⚠ failed: {answer.get('detail') or ''}"
    if answer["outcome"] == "unparsed":
        return f"⚠ unparsed: {_text(answer)}"
    right = _number(answer.get("exact_match") if answer.get("correct") is None else answer["correct"])
    return MARKS.get(-1.0 if right is None else right, "") + _text(answer) + " …" * (answer.get("is_complete") is False)


def _text(answer: Record) -> str:
    return answer.get("text") or ""
