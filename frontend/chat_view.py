"""What both chat pages draw: the servers' states, the turns with a pane for each contender, and the question box.

A pane has title, answer, error, figures and token bar, as HTML without a chart library. Texts are escaped: an answer is
shown letter for letter. Elements that a script may want to read have a `data-testid`, figures also `data-figure` and
`data-value` (empty: unknown).
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.runtime.scriptrunner import StopException

import state
from chat import Answer, Chat, Draft, Turn
from chat_session import ChatSession
from figures import Figures, prefix_cache_note, similar_task_html, slot_turn_html, speed_line
from runs import RELOAD_S, OpenChat, Run
from tokens import Span, answer_tokens_html, diff_html, first_difference, first_token_difference, legend_html
from verdict import are_comparable, exact_answer
from waterfall import Row, shown_ms, waterfall_html


@dataclass(frozen=True)
class Part:
    """`kind` is the CSS class that colours the part."""

    kind: str
    label: str
    num_tokens: int


def token_parts(figures: Figures) -> list[Part]:
    """The prompt's tokens by cost, without the empty kinds; empty when the server didn't say."""
    counts = (
        ("prefix", "from prefix cache", figures.num_prefix_tokens or 0),
        ("reused", "reused", figures.num_moved_tokens),
        ("recomputed", "recomputed", figures.num_recomputed_tokens),
        ("computed", "computed", figures.num_computed_tokens),
    )
    if any(count is None for _, _, count in counts):
        return []
    return [Part(kind, label, count) for kind, label, count in counts if count]


def token_bar(figures: Figures) -> str:
    """A stacked bar of `token_parts` with its legend, and below it where in the prompt they are."""
    parts = token_parts(figures)
    total = sum(part.num_tokens for part in parts)
    if not total:
        return ""
    cells = "".join(
        f'<span class="ka-part ka-{part.kind}" style="width:{100 * part.num_tokens / total:.3f}%" '
        f'title="{part.num_tokens:,} tokens {part.label}"></span>'
        for part in parts
    )
    legend = legend_html((part.kind, f"{part.num_tokens:,} {part.label}") for part in parts)
    strip = _strip(figures.spans)
    where = '<span class="ka-key">below: where in the prompt</span>' if strip else ""
    return (
        f'<div class="ka-bar" data-testid="token-bar">{cells}</div>{strip}<div class="ka-legend">{legend}{where}</div>'
    )


MISS_REASONS = {
    "never_seen": "never seen before",
    "other_salt": "stored without this salt",
    "other_model": "stored by another model",
    "evicted": "no longer in the store",
    "store_down": "the store didn't answer",
    "boundary_inside_token": "begins or ends inside a token",
    "too_short": "too short",
    "mostly_new": "after too much new text",
}


def misses_line(figures: Figures) -> str:
    """Why chunks and the system prompt weren't reused; empty if all were."""
    chunks = ", ".join(f"{count:,} {MISS_REASONS.get(reason, reason)}" for reason, count in figures.misses)
    system = MISS_REASONS.get(figures.system_miss, figures.system_miss)
    told = [f"{what} not reused: {why}" for what, why in (("Chunks", chunks), ("System prompt", system)) if why]
    return f'<div class="ka-misses" data-testid="misses">{escape(". ".join(told))}</div>' if told else ""


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


STATE_LABELS = {"streaming": "answering", "done": ""}
"""Where the page has another word for the state."""


@dataclass(frozen=True)
class Figure:
    key: str
    label: str
    value: float | None
    show: Callable[[float], str] = "{:,.0f}".format

    def text(self) -> str:
        return "–" if self.value is None else self.show(self.value)


def answer_html(
    answer: Answer, note: str = "", exact: Answer | None = None, as_row: bool = False, side: str = ""
) -> str:
    """A pane; it changes whenever the answer does. `note` is on its prompt, `exact` is the answer that it is compared
    with, `side` its letter in a blind turn.
    """
    shown = answer_tokens_html(answer.figures.tokens) or escape(answer.text.lstrip())
    name, difference = escape(answer.contender.name), difference_html(answer, exact) if exact else ""
    named = f"{answer.contender.icon} {answer.contender.title}".strip()
    row, title = " ka-row" if as_row else "", f"{side}: {named}" if side else named
    return (
        f'<div class="ka-pane ka-state-{answer.state}{row}" data-testid="pane-{name}" data-state="{answer.state}">'
        f'<div class="ka-pane-head"><b>{escape(title)}</b>{_badges(answer)}</div><div>'
        f'<div class="ka-answer ka-text" data-testid="answer-{name}">{shown}'
        f"{'<i class=ka-cursor></i>' if answer.state == 'streaming' else ''}</div>"
        f"{difference}{_notice(answer)}{_note_html(note)}</div><div>{_figures_html(answer)}</div></div>"
    )


def blind_html(side: str, answer: Answer, can_vote: bool) -> str:
    """One side of a blind turn: only the text, and only once all are there, since the first to arrive would give it
    away.
    """
    shown = escape(answer.text.strip()) or "<i>no text</i>"
    return (
        f'<div class="ka-pane" data-testid="pane-{side}" data-state="{"done" if can_vote else "waiting"}">'
        f'<div class="ka-pane-head"><b>{side}</b></div>'
        f'<div class="ka-answer ka-text" data-testid="answer-{side}">{shown if can_vote else "…"}</div>'
        f"{_cut_html(answer) if can_vote else ''}</div>"
    )


def _badges(answer: Answer) -> str:
    figures = answer.figures
    badges: list[tuple[str, str]] = []
    if label := STATE_LABELS.get(answer.state, answer.state):
        badges.append((answer.state, label))
    if figures.approximate is not None and answer.state == "done":
        kind = "approximate" if figures.approximate else "exact"
        badges.append((kind, f"{kind}{_way(figures)}"))
    return "".join(f'<span class="ka-badge ka-badge-{kind}">{escape(text)}</span>' for kind, text in badges)


def _way(figures: Figures) -> str:
    """How the contender reused, if it has several ways."""
    if figures.task and figures.task.similarity is not None:
        return f" · {figures.task.mode}"
    if not figures.policy or not figures.approximate:
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
    return _cut_html(answer)


def _cut_html(answer: Answer) -> str:
    return '<div class="ka-notice">Cut at max tokens.</div>' if answer.finish_reason == "length" else ""


def difference_html(answer: Answer, exact: Answer) -> str:
    """Whether this answer equals the exact one, or where it begins to differ, and how."""
    if answer is exact or answer.state != "done":
        return ""
    name, title = escape(answer.contender.name), escape(exact.contender.title)
    difference = first_difference(answer.text, exact.text)
    if difference is None:
        return f'<div class="ka-same" data-testid="difference-{name}">Same answer as {title}</div>'
    at = first_token_difference(answer.figures.tokens, exact.figures.tokens)
    token = "" if at is None else f", token {at}"
    return (
        f'<div class="ka-differs" data-testid="difference-{name}">'
        f"Differs from {title} from word {difference}{token} on"
        f'<div class="ka-text">{diff_html(answer.text.strip(), exact.text.strip())}</div></div>'
    )


def _note_html(note: str) -> str:
    return f'<div class="ka-notice ka-prompt-note" data-testid="prompt-note">{escape(note)}</div>' if note else ""


def _figures_html(answer: Answer) -> str:
    figures = answer.figures
    if figures.first_token_ms is None:
        return ""
    large = [
        Figure("first_token_ms", "time to first token", figures.first_token_ms, shown_ms),
        Figure("tokens_per_s", "tokens per second", figures.tokens_per_s, "{:,.1f}".format),
        Figure("total_ms", "total time", figures.total_ms, "{:,.0f} ms".format),
    ]
    small = [
        Figure("num_prompt_tokens", "prompt tokens", figures.num_prompt_tokens),
        Figure("num_prefix_tokens", "from prefix cache", figures.num_prefix_tokens),
        Figure("num_moved_tokens", "reused", figures.num_moved_tokens),
        Figure("num_recomputed_tokens", "recomputed", figures.num_recomputed_tokens),
        Figure("num_computed_tokens", "computed", figures.num_computed_tokens),
        Figure("num_output_tokens", "output tokens", figures.num_output_tokens),
    ]
    if not answer.over:  # until there are more figures, the words have the room
        large, small = ([one for one in group if one.value is not None] for group in (large, small))
    return (
        f"{similar_task_html(figures.task) if figures.task else ''}"
        f"{slot_turn_html(figures.slot_turn) if figures.slot_turn else ''}"
        f'<div class="ka-figures ka-large">{"".join(map(_figure_html, large))}</div>'
        f'<div class="ka-figures ka-small">{"".join(map(_figure_html, small))}</div>'
        f"{token_bar(figures)}"
        f"{misses_line(figures)}"
    )


def _figure_html(figure: Figure) -> str:
    value = "" if figure.value is None else f"{figure.value:g}"
    return (
        f'<div class="ka-figure" data-figure="{figure.key}" data-value="{value}">'
        f"<span>{figure.label}</span><b>{figure.text()}</b></div>"
    )


TICK_S = 0.08
MAX_PANES = 3
"""More contenders than these are drawn as rows."""


class TurnView:
    """A turn's place on the page; `draw` brings it up to date."""

    def __init__(self, turn: Turn, key: str, notes: Mapping[str, str], earlier: Sequence[Turn] = ()) -> None:
        """`notes` are on the contenders' prompts; `earlier` are the turns that this one follows on from."""
        self.turn, self._notes, self._earlier = turn, notes, earlier
        self._as_rows = len(turn.answers) > MAX_PANES
        with st.container(key=key):
            self._speed = st.empty()
            with st.container(key=f"panes-{key}"):
                places = [st] * len(turn.answers) if self._as_rows else st.columns(max(len(turn.answers), 1))
                self._panes: list[DeltaGenerator] = [place.empty() for place in places]
            self._waterfall = st.empty()

    def draw(self, only_live: bool = False) -> None:
        if self.turn.is_blind:
            for pane, (side, answer) in zip(self._panes, self.turn.sides(), strict=True):
                pane.html(blind_html(side, answer, self.turn.can_vote))
            return
        if html := speed_html(self.turn):
            self._speed.html(html)
        if html := waterfall_html(_rows(self.turn)):
            self._waterfall.html(html)
        for pane, (side, answer) in zip(self._panes, self.turn.sides(), strict=True):
            if not (only_live and answer.over):
                note = self._notes.get(answer.contender.name, "")
                pane.html(answer_html(answer, note, self._compared_with(answer), self._as_rows, side))

    def _compared_with(self, answer: Answer) -> Answer | None:
        exact = exact_answer(self.turn)
        return exact if exact and are_comparable(answer, exact, self.turn, self._earlier) else None


def _rows(turn: Turn) -> list[Row]:
    return [
        Row(one.contender.name, one.contender.title, one.figures.first_token_ms, one.figures.stages, _decode_ms(one))
        for one in turn.answers.values()
        if one.figures.first_token_ms is not None
    ]


def _decode_ms(answer: Answer) -> float | None:
    """None for an answer that hasn't ended."""
    first_ms, total_ms = answer.figures.first_token_ms, answer.figures.total_ms
    return None if answer.state != "done" or first_ms is None or total_ms is None else total_ms - first_ms


SERVERS_POLL_S = 4.0
FOLLOW_S = 1.5
MANY_AT_ONCE = 3
AT_ONCE = "All were asked at once, and may have slowed each other down. “One after the other” on the left avoids that."
NUM_DRAWN = 8
"""Of the latest turns, unless all are wanted: each script run draws them, so a long chat would make clicks slow."""


def draw_turns(opened: OpenChat, below: Callable[[int, bool], None]) -> TurnView | None:
    """Draws the chat's last turns, or all if wanted, and returns the view of the live one, if there is one. `below`
    draws what stands under a turn: it gets the turn's index, and whether it is live.
    """
    chat, live = opened.chat, None
    first = _first_drawn(chat)
    for index, turn in enumerate(chat.turns[first:], start=first):
        if chat.begins_context(index):
            st.html(_divider_html(chat, index))
        if turn.repeats is not None:
            st.html(f'<div class="ka-divider" data-testid="again">{chat.again_text(index)}</div>')
        is_live = opened.run is not None and opened.run.turn is turn
        st.html(f'<div class="ka-question ka-text" data-testid="question">{escape(turn.question)}</div>')
        view = TurnView(turn, f"turn-{index}", _prompt_notes(chat, index), chat.followed(index))
        view.draw()
        if is_live:
            live = view
        below(index, is_live)
    return live


def _first_drawn(chat: Chat) -> int:
    num_earlier = len(chat.turns) - NUM_DRAWN
    if num_earlier <= 0 or st.toggle(f"Show all {len(chat.turns)} turns", key=f"all-turns-{chat.key}"):
        return 0
    return num_earlier


def _prompt_notes(chat: Chat, index: int) -> dict[str, str]:
    """Which prompts lack earlier turns that others have."""
    missed = chat.missed(index)
    return {
        name: f"Another prompt than the others': {count} earlier turn{'' if count == 1 else 's'} of this conversation "
        f"{'is' if count == 1 else 'are'} not in it."
        for name, count in missed.items()
        if count
    }


def watch(opened: OpenChat, run: Run, view: TurnView, also: Callable[[], None] = lambda: None) -> None:
    """Draws a run until it is over, then the whole page again; `also` draws whatever else changes meanwhile.

    A click elsewhere on the page ends this script run but not the answers: the next script run goes on watching. When
    the last page that watches has gone and none comes back in time, the run is stopped. Both end this loop by an
    exception in `view.draw`.
    """
    watcher = str(st.session_state.setdefault("watcher", uuid.uuid4().hex))
    run.watchers.add(watcher)
    try:
        while run.advance():
            view.draw(only_live=True)
            also()
            time.sleep(TICK_S)
    except StopException:
        opened.leave(watcher, RELOAD_S)
        raise
    opened.end(run)
    st.rerun()


def speed_html(turn: Turn) -> str:
    """From measured times only, and only if there are two to compare."""
    answers = [answer for answer in turn.answers.values() if answer.figures.first_token_ms is not None]
    times = [(answer.contender.title, answer.figures.first_token_ms or 0.0) for answer in answers]
    line = speed_line(times)
    if not line:
        return ""
    note = prefix_cache_note([(answer.contender.title, answer.figures) for answer in answers])
    small = f'<small data-testid="prefix-note">{escape(note)}</small>' if note else ""
    if len(answers) >= MANY_AT_ONCE and not turn.in_sequence:
        small += f"<small>{AT_ONCE}</small>"
    first = min(answers, key=lambda answer: answer.figures.first_token_ms or 0.0)
    exact = exact_answer(turn)
    if any(one.figures.is_mostly_cached for one in answers if one is exact or one.contender.approximate):
        line = "Not a fair race: most of this prompt was in a prefix cache"
    return (
        f'<div class="ka-one-sample" data-testid="speed-up" data-winner="{escape(first.contender.name)}">'
        f"<span>{escape(line)}</span>{small}</div>"
    )


def _divider_html(chat: Chat, index: int) -> str:
    num_chunks = len(chat.turns[index].context.chunks)
    chunks = f"{num_chunks} chunk{'' if num_chunks == 1 else 's'}"
    text = f"Conversation over {chunks}" if index == 0 else f"New context: conversation over {chunks}"
    return f'<div class="ka-divider" data-testid="divider">{text}</div>'


# -- servers, notices and the question box -----------------------------------------------------------------------------


def draw_servers(sessions: Mapping[str, ChatSession], busy: bool) -> None:
    """Asks the servers first, unless an answer is under way."""
    if not busy:
        state.refresh_servers(sessions)
    _draw_live_servers(sessions, state.servers_seen(sessions), busy)


@st.fragment(run_every=SERVERS_POLL_S)
def _draw_live_servers(sessions: Mapping[str, ChatSession], drawn: tuple[object, ...], busy: bool) -> None:
    """Redraws the page when a server went up or down."""
    if not busy:
        state.refresh_servers(sessions)
        if state.servers_seen(sessions) != drawn:
            st.rerun()
    st.html("".join(_server_html(session) for session in sessions.values()))


def _server_html(session: ChatSession) -> str:
    contender, server = session.contender, session.server
    up = "up" if session.up else "down"
    detail = server.model if session.up and server else session.problem
    if session.up and server and server.max_model_len:
        detail += f", context of {server.max_model_len:,} tokens"
    return (
        f'<div class="ka-server" data-testid="server-{escape(contender.name)}" data-state="{up}"><i></i>'
        f"<div>{escape(contender.title)}: {up}<small>{escape(detail)}</small></div></div>"
    )


_ASKED = "asked"
"""A chat's key and the question that waits in it."""


def waiting_question(chat: Chat) -> str:
    """What was typed or clicked and isn't under way yet; empty if nothing was."""
    key, question = st.session_state.get(_ASKED, ("", ""))
    return str(question) if key == chat.key else ""


def take_asked(opened: OpenChat, make_run: Callable[[], Run], draft: Draft) -> bool:
    """Starts a run of it. False: another page with this chat was first, so it goes on waiting."""
    if begun := opened.begin(make_run, draft):
        del st.session_state[_ASKED]
    return begun


def put_question(chat: Chat, question: str) -> None:
    st.session_state[_ASKED] = (chat.key, question)


def literal(text: str) -> str:
    """For places that read Markdown: shows what a person typed as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!$:~<>|&])", r"\\\1", " ".join(text.split()))


def draw_notices(opened: OpenChat) -> None:
    """Says if the chat won't last, or if it or its settings aren't those of the address. Call after the sidebar."""
    if problem := state.chat_file().problem:
        st.warning(problem, icon=":material/save:")
    if state.is_for_lost_link(opened) and not opened.chat.turns:
        st.warning("The chat of this link isn't known here. This is a new one.", icon=":material/link_off:")
    if refused := state.refused_settings(opened):
        named = ", ".join(f"{literal(key)} = {literal(value)}" for key, value in refused.items())
        st.warning(f"The page's address has settings that nothing here takes: {named}", icon=":material/link_off:")


@st.fragment(run_every=FOLLOW_S)
def _follow(opened: OpenChat, drawn: tuple[object, ...]) -> None:
    """Redraws the page when another page has gone on with the chat."""
    if opened.state != drawn:
        st.rerun()


def draw_question_box(
    opened: OpenChat, placeholder: str, enabled: bool, on_ask: Callable[[], None] = lambda: None
) -> None:
    """`on_ask` is called once something was sent, before the page is drawn again."""
    _follow(opened, opened.state)
    if waiting := waiting_question(opened.chat):
        st.caption(f"Next in line: {literal(waiting)}")
    with st.bottom:  # explicitly, or Streamlit would scroll the page to its end
        if opened.busy:
            st.button("Stop", key="stop", type="primary", on_click=opened.stop)
        # A box of its own for large type: Streamlit measures a box's height once, in pixels.
        key = "question-big" if state.is_big_screen() else "question"
        st.chat_input(
            "Answering" if opened.busy else placeholder,
            key=key,
            disabled=opened.busy or not enabled,
            on_submit=_take_typed,
            args=[key, opened.chat, on_ask],
        )


def _take_typed(key: str, chat: Chat, on_ask: Callable[[], None]) -> None:
    put_question(chat, (st.session_state[key] or "").strip())
    on_ask()
