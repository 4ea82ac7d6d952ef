"""Draws the chat: per turn the question, who was first by how much, and a pane per contender; and the live turn.

A pane has title, answer, error, figures and token bar, as HTML without a chart library. Texts are escaped: an answer
is shown letter for letter. Elements that a script may want to read carry `data-testid`, figures also `data-figure`
and `data-value` (empty: unknown).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.runtime.scriptrunner import StopException

from chat import Answer, Chat, Turn
from figures import Figures, Span, prefix_cache_note, similar_task_html, slot_turn_html, speed_line
from runs import OpenChat, Run


@dataclass(frozen=True)
class Part:
    """`kind` is the CSS class that colours the part."""

    kind: str
    label: str
    num_tokens: int


def token_parts(figures: Figures) -> list[Part]:
    """The prompt's tokens by cost, without the empty kinds; empty when the server didn't say."""
    counts = (
        figures.num_reused_tokens,
        figures.num_recomputed_tokens,
        figures.num_computed_tokens,
    )
    if any(count is None for count in counts):
        return []
    reused, recomputed, computed = (count or 0 for count in counts)
    prefix = min(figures.num_prefix_tokens or 0, reused)
    parts = [
        Part("prefix", "prefix cache", prefix),
        Part("reused", "reused", reused - prefix),
        Part("recomputed", "recomputed", recomputed),
        Part("computed", "computed", computed),
    ]
    return [part for part in parts if part.num_tokens > 0]


def token_bar(figures: Figures) -> str:
    """A stacked bar of `token_parts` with its legend, and below it where in the prompt they stand."""
    parts = token_parts(figures)
    total = sum(part.num_tokens for part in parts)
    if not total:
        return ""
    cells = "".join(
        f'<span class="ka-part ka-{part.kind}" style="width:{100 * part.num_tokens / total:.3f}%" '
        f'title="{part.num_tokens:,} tokens {part.label}"></span>'
        for part in parts
    )
    legend = "".join(
        f'<span class="ka-key"><i class="ka-{part.kind}"></i>{part.num_tokens:,} {part.label}</span>' for part in parts
    )
    return (
        f'<div class="ka-bar" data-testid="token-bar">{cells}</div>'
        f"{_strip(figures.spans)}"
        f'<div class="ka-legend">{legend}</div>'
    )


def _strip(spans: Sequence[Span]) -> str:
    total = max((span.end for span in spans), default=0)
    if not total or not any(span.source == "reused" for span in spans):
        return ""
    cells = "".join(
        f'<span class="ka-part ka-{span.source}" style="left:{100 * span.start / total:.3f}%;'
        f'width:{100 * (span.end - span.start) / total:.3f}%" '
        f'title="tokens {span.start:,} to {span.end:,}: {span.source}"></span>'
        for span in spans
        if span.source in ("prefix", "reused", "computed")
    )
    return f'<div class="ka-strip" data-testid="span-strip">{cells}</div>'


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


TICK_S = 0.08


class TurnView:
    """A turn's place on the page; `draw` brings it up to date."""

    def __init__(self, turn: Turn, key: str) -> None:
        self.turn = turn
        with st.container(key=key):
            self._speed = st.empty()
            columns = st.columns(max(len(turn.answers), 1))
            self._panes: list[DeltaGenerator] = [column.empty() for column in columns]

    def draw(self, only_live: bool = False) -> None:
        if html := speed_html(self.turn):
            self._speed.html(html)
        for pane, answer in zip(self._panes, self.turn.answers.values(), strict=False):
            if not (only_live and answer.over):
                pane.html(answer_html(answer))


def draw_turns(opened: OpenChat) -> TurnView | None:
    """Every turn of the chat; the view of the live one, if there is one."""
    chat, live = opened.chat, None
    for index, turn in enumerate(chat.turns):
        if chat.begins_context(index):
            st.html(_divider_html(chat, index))
        is_live = opened.run is not None and opened.run.turn is turn
        st.html(f'<div class="ka-question ka-text" data-testid="question">{escape(turn.question)}</div>')
        view = TurnView(turn, f"turn-{index}")
        view.draw()
        if is_live:
            live = view
    return live


def watch(opened: OpenChat, run: Run, view: TurnView, also: Callable[[], None] = lambda: None) -> None:
    """Draws a run until it is over, then the page anew; `also` draws whatever else changes meanwhile.

    A click elsewhere on the page ends this script run but not the answers: the next script run goes on watching.
    When the page itself goes, its workers are stopped. Either reaches this loop as an exception out of `view.draw`.
    """
    try:
        while run.advance():
            view.draw(only_live=True)
            also()
            time.sleep(TICK_S)
    except StopException:
        opened.stop()
        raise
    if opened.run is run:
        opened.run = None
    st.rerun()


def speed_html(turn: Turn) -> str:
    """From measured times only, and only once there are two to compare."""
    answers = [answer for answer in turn.answers.values() if answer.figures.first_token_ms is not None]
    times = [(answer.contender.title, answer.figures.first_token_ms or 0.0) for answer in answers]
    line = speed_line(times)
    if not line:
        return ""
    note = prefix_cache_note([(answer.contender.title, answer.figures) for answer in answers])
    small = f'<small data-testid="prefix-note">{escape(note)}</small>' if note else ""
    first = min(answers, key=lambda answer: answer.figures.first_token_ms or 0.0)
    return (
        f'<div class="ka-speed" data-testid="speed-up" data-winner="{escape(first.contender.name)}">'
        f"{escape(line)}{small}</div>"
    )


def _divider_html(chat: Chat, index: int) -> str:
    num_chunks = len(chat.turns[index].context.chunks)
    chunks = f"{num_chunks} chunk{'' if num_chunks == 1 else 's'}"
    text = f"Conversation over {chunks}" if index == 0 else f"New context: conversation over {chunks}"
    return f'<div class="ka-divider" data-testid="divider">{text}</div>'
