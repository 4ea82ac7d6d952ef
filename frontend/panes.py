"""One contender's pane of one turn, as HTML: title, answer, error, figures, token bar.

Texts are escaped: an answer is shown letter for letter. Elements that a script may want to read carry `data-testid`,
figures also `data-figure` and `data-value` (empty: unknown).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from html import escape

from charts import token_bar
from figures import Figures
from history import Answer
from similar_task import similar_task_html
from slot_turn import slot_turn_html

STATE_LABELS = {
    "waiting": "waiting",
    "streaming": "answering",
    "done": "",
    "interrupted": "interrupted",
    "failed": "failed",
}


@dataclass(frozen=True)
class Figure:
    key: str
    label: str
    value: float | None
    digits: int = 0
    unit: str = ""

    def text(self) -> str:
        return "–" if self.value is None else f"{self.value:,.{self.digits}f}{self.unit}"


def answer_html(answer: Answer) -> str:
    """The pane without its place on the page; changes whenever the answer does."""
    name = escape(answer.contender.name)
    return (
        f'<div class="ka-pane ka-state-{answer.state}" data-testid="pane-{name}" data-state="{answer.state}">'
        f'<div class="ka-pane-head"><b>{escape(answer.contender.title)}</b>{_badges(answer)}</div>'
        f'<div class="ka-answer ka-text" data-testid="answer-{name}">{escape(answer.text.lstrip())}'
        f"{'<i class=ka-cursor></i>' if answer.state == 'streaming' else ''}</div>"
        f"{_notice(answer)}{_figures_html(answer)}</div>"
    )


def _badges(answer: Answer) -> str:
    figures = answer.figures
    badges: list[tuple[str, str]] = []
    if label := STATE_LABELS[answer.state]:
        badges.append((answer.state, label))
    if figures.approximate is not None and answer.state == "done":
        kind = "approximate" if figures.approximate else "exact"
        badges.append((kind, f"{kind}{_way(figures)}"))
    return "".join(f'<span class="ka-badge ka-badge-{kind}">{escape(text)}</span>' for kind, text in badges)


def _way(figures: Figures) -> str:
    """How the contender reused, where there are several ways."""
    if figures.task and figures.task.similarity is not None:
        return f" · {figures.task.mode}"
    if not figures.policy:
        return ""
    return f" · {figures.policy}" + ("" if figures.ratio is None else f" {figures.ratio:.0%}")


def _notice(answer: Answer) -> str:
    if answer.state == "failed":
        return f'<div class="ka-error" data-testid="error">{escape(answer.error)}</div>'
    if answer.state == "waiting" and answer.started_s is not None:
        waited_s = time.perf_counter() - answer.started_s
        return f'<div class="ka-notice">No token yet, {waited_s:.1f} s</div>'
    if answer.state == "waiting":
        return '<div class="ka-notice">Next in line</div>'
    if answer.state == "interrupted":
        kept = "what had arrived is kept" if answer.text else "nothing had arrived"
        return f'<div class="ka-notice">Interrupted: {kept}.</div>'
    if answer.state == "done" and not answer.text.strip():
        return '<div class="ka-notice">The model ended its answer at once, without any text.</div>'
    if answer.finish_reason == "length":
        return '<div class="ka-notice">Cut at max tokens.</div>'
    return ""


def _figures_html(answer: Answer) -> str:
    figures = answer.figures
    if figures.first_token_ms is None:
        return ""
    large = [
        Figure("first_token_ms", "time to first token", figures.first_token_ms, 1, " ms"),
        Figure("tokens_per_s", "tokens per second", figures.tokens_per_s, 1),
        Figure("total_ms", "total time", figures.total_ms, 0, " ms"),
    ]
    small = [
        Figure("num_prompt_tokens", "prompt tokens", figures.num_prompt_tokens),
        Figure("num_reused_tokens", "reused", figures.num_reused_tokens),
        Figure("num_recomputed_tokens", "recomputed", figures.num_recomputed_tokens),
        Figure("num_computed_tokens", "computed", figures.num_computed_tokens),
        Figure("num_prefix_tokens", "prefix-cached", figures.num_prefix_tokens),
        Figure("num_output_tokens", "output tokens", figures.num_output_tokens),
    ]
    return (
        f"{similar_task_html(figures.task) if figures.task else ''}"
        f"{slot_turn_html(figures.slot_turn) if figures.slot_turn else ''}"
        f'<div class="ka-figures ka-large">{"".join(map(_figure_html, large))}</div>'
        f'<div class="ka-figures ka-small">{"".join(map(_figure_html, small))}</div>'
        f"{token_bar(figures)}"
    )


def _figure_html(figure: Figure) -> str:
    value = "" if figure.value is None else f"{figure.value:g}"
    return (
        f'<div class="ka-figure" data-figure="{figure.key}" data-value="{value}">'
        f"<span>{figure.label}</span><b>{figure.text()}</b></div>"
    )
