"""What the pages show of an eval beside Quality's charts: tables, the answers side by side, and what Measure draws.

Rows become plain records, one object per line of a table; what draws them is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval_results import ALL_QUESTIONS, EvalAnswer, EvalResult, Row, Variant
from kvarena.panels.panel import ALL_KINDS, Panel, colours_in, variant_label
from kvarena.panels.quality import METRICS, rows_with, share_panel

Record = dict[str, Any]
NEW_COLUMNS = ("Right", "vs. full prefill", "Tokens", "KL along answer")
MARKS = {1.0: "✓ ", 0.0: "✗ "}


def metrics_of(result: EvalResult) -> list[str]:
    """Those that the file has; older ones lack some. All for a file that has none."""
    return [metric for metric in METRICS if any(metric in row.metrics for row in result.rows)] or list(METRICS)


def percent(share: float) -> str:
    return f"{round(100 * share, 1):g} %"


def line_name(result: EvalResult, variant: Variant) -> str:
    """Of the line that this variant is a point of: its policy, and what else tells this file's lines apart."""
    if variant.policy is None:
        return variant.contender
    blending = [other for other in result.variants if other.policy is not None]
    layers = {other.check_layer for other in blending if other.policy == variant.policy}
    parts = [variant.policy_name]
    if len({other.contender for other in blending}) > 1:
        parts.insert(0, variant.contender)
    if len(layers) > 1:
        parts.append("default layer" if variant.check_layer is None else f"layer {variant.check_layer}")
    return " · ".join(parts)


def variant_name(result: EvalResult, variant: Variant) -> str:
    name = line_name(result, variant)
    return name if variant.ratio is None else f"{name} · {percent(variant.ratio)}"


def table(result: EvalResult, kind: str, subset: str = ALL_QUESTIONS) -> list[Record]:
    """Columns that this file has no figure of are left out where older files lack them."""
    records = [_table_row(row) for row in result.rows_of(kind, subset)]
    unknown = [name for name in NEW_COLUMNS if all(record[name] is None for record in records)]
    return [{name: value for name, value in record.items() if name not in unknown} for record in records]


MEASURED_COLUMNS = ("Questions", "Failed", "TTFT median", "TTFT p95", "Agreement", "Right")


def measured_table(result: EvalResult, kind: str) -> list[Record]:
    """Of `table`, what a run is started for; a variant per line."""
    records = []
    for row in result.rows_of(kind):
        figures = _table_row(row)
        shown = {name: figures[name] for name in MEASURED_COLUMNS}
        shown |= {name: round(shown[name]) for name in ("TTFT median", "TTFT p95") if shown[name] is not None}
        records.append({"Variant": variant_name(result, row.variant), **shown})
    return records


def cached_note(found: Mapping[str, Any]) -> str:
    """Of which contenders' first tokens came from prompts that were asked before; empty where none did."""
    rows = [row for row in found["rows"] if (row["kind"], row.get("subset")) == (ALL_KINDS, ALL_QUESTIONS)]
    told = [
        f"{variant_label(row)}: {row['num_cached']} of {row['num_questions']}" for row in rows if row.get("num_cached")
    ]
    if not told:
        return ""
    return f"Prompts that were mostly in a prefix cache, and are fast for that reason: {'; '.join(told)}."


MEASURED_METRICS = ("agreement", "correct")


def measured_panels(found: Mapping[str, Any]) -> list[Panel]:
    """How often the answers were full prefill's, and right, with intervals; as far as the result file has it."""
    of_all = [
        row for row in found["rows"] if (row["kind"], row.get("subset") or ALL_QUESTIONS) == (ALL_KINDS, ALL_QUESTIONS)
    ]
    colours = colours_in([found])
    return [
        share_panel(rows, metric, "all questions", colours)
        for metric in MEASURED_METRICS
        if (rows := rows_with(of_all, metric))
    ]


def times(result: EvalResult) -> list[Record]:
    """Every answer's time to first token; empty for older files."""
    return [
        {"variant": variant_name(result, variant), "ttft_ms": answer.ttft_ms, "question": result.questions[index].text}
        for (variant, index), answer in result.answers.items()
        if answer.ttft_ms is not None
    ]


def _table_row(row: Row) -> Record:
    variant, exact = row.variant, row.metrics.get("exact_match")
    means = {name: interval.mean for name, interval in row.metrics.items()}
    return {
        "Contender": variant.contender,
        "Policy": variant.policy_name or None,
        "Ratio": variant.ratio,
        "Check layer": variant.check_layer,
        "Questions": row.num_questions,
        "Failed": row.num_failed,
        "Cut": row.num_cut,
        "Right": means.get("correct"),
        "vs. full prefill": means.get("correct_vs_reference"),
        "Exact match": means.get("exact_match"),
        "EM low": exact.low if exact else None,
        "EM high": exact.high if exact else None,
        "vs. reference": means.get("exact_match_vs_reference"),
        "Token F1": means.get("f1"),
        "Agreement": means.get("agreement"),
        "Tokens": means.get("token_agreement"),
        "KL along answer": means.get("kl_along_answer"),
        "KL": means.get("first_token_kl"),
        "TTFT median": row.ttft_median_ms,
        "TTFT p95": row.ttft_p95_ms,
        "Reused": row.reused_ratio,
    }


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
        parts.append(f"full prefill: {result.reference.label}")
    parts += machine.get("gpus") or [f"{machine['cpu']}, {machine.get('num_cores')} cores"] * ("cpu" in machine)
    return " · ".join(parts)


def problems(result: EvalResult, kind: str, subset: str = ALL_QUESTIONS) -> str:
    """How many answers there weren't; empty when all were there."""
    rows = result.rows_of(kind, subset)
    failed = sum(row.num_failed for row in rows)
    return f"Of {sum(row.num_questions for row in rows):,} answers {failed:,} failed." if failed else ""


def answer_table(result: EvalResult, kind: str, variants: Sequence[Variant], only_different: bool) -> list[Record]:
    """A line per question of this kind, a column per variant; `only_different` from the reference in any of them."""
    lines = []
    for index, question in enumerate(result.questions):
        if kind not in (ALL_KINDS, question.kind):
            continue
        answers = {variant: result.answers.get((variant, index)) for variant in variants}
        if only_different and not any(_differs(result, index, answer) for answer in answers.values()):
            continue
        cells = {variant_name(result, variant): _cell(answer) for variant, answer in answers.items()}
        lines.append({"Question": question.text, "Gold": " / ".join(question.gold), **cells})
    return lines


def _differs(result: EvalResult, index: int, answer: EvalAnswer | None) -> bool:
    reference = result.answers.get((result.reference, index)) if result.reference else None
    if answer is None or reference is None:
        return False
    return (answer.outcome, answer.text.strip()) != (reference.outcome, reference.text.strip())


def _cell(answer: EvalAnswer | None) -> str | None:
    if answer is None:
        return None
    if answer.outcome == "failed":
        return f"⚠ failed: {answer.detail}"
    if answer.outcome == "unparsed":
        return f"⚠ unparsed: {answer.text}"
    right = answer.exact_match if answer.correct is None else answer.correct
    return MARKS.get(-1.0 if right is None else right, "") + answer.text + ("" if answer.is_complete else " …")
