"""Arena: the same question to every contender, side by side. Draws only; `chat_session.py` does all HTTP.

A script run reads the choices, draws the context and the chat, and then watches the question in progress, if any.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import streamlit as st

import state
from chat import Answer, Chat, Context, Turn, Vote
from chat_view import (
    draw_notices,
    draw_question_box,
    draw_turns,
    literal,
    put_question,
    take_asked,
    waiting_question,
    watch,
)
from contender_api import RATIO, ContenderError
from context_lengths import note_of
from context_view import TokenCount, context_html, num_fitting, summary
from examples import Example, follow_ups, load_examples
from export import draw_copies, draw_export
from kvarena.panels.kinds import TTFT
from result_picker import measured_results
from runs import OpenChat, Run
from servers_view import Watched, server_html
from settings import Service
from sidebar import ArenaChoices, draw_arena_sidebar
from tokens import Span, kinds_of, tokens_html
from verdict import verdict_html
from votes import ballots_of, standings

NUM_EXAMPLES = 4
NUM_TOKEN_COLUMNS = 3
ROOM_FOR_QUESTION = 64  # tokens
WATCH_S = 1.0


def main() -> None:
    st.html('<div class="ka-title">KV Arena<small>the same question, with and without reused KV</small></div>')
    try:
        opened = state.open_chat()
        choices = draw_arena_sidebar(opened)
    except ValueError as error:
        st.error(str(error))
        st.stop()
    if notice := state.page_settings().notice:
        st.info(notice)
    draw_notices(opened)
    verdict = st.container(key="verdict")
    count = draw_context(choices)
    ask(opened, choices)
    if not opened.chat.turns:
        draw_examples(opened.chat)
    else:
        with st.container(horizontal=True):
            draw_export(opened.chat)
            draw_tally(opened.chat)
    if html := verdict_html(opened.chat.turns, measured_note):
        verdict.html(html)
    drawers: list[LiveDrawer] = []
    view = draw_turns(opened, lambda index, is_live: draw_below(opened, index, is_live, drawers))
    draw_follow_ups(opened, choices)
    draw_input(opened, choices, count)
    if (run := opened.run) and view and view.turn is run.turn:
        watch(opened, run, view, also=lambda: keep_up(drawers))


def measured_note(answer: Answer) -> str:
    """From the newest measurement over context lengths that covers its contender and setting."""
    model = str(answer.request.get("model", ""))
    notes = (note_of(result, answer.contender, answer.figures, model) for result in measured_results(TTFT))
    return next((note for note in notes if note), "")


def ask(opened: OpenChat, choices: ArenaChoices) -> None:
    """Turns the question that was typed or clicked into a run with the page's current choices. A question that comes
    while another is under way, in any tab, waits for it.
    """
    if not choices.sessions or opened.busy:
        return
    if question := waiting_question(opened.chat):
        take_asked(opened, lambda: _run(opened.chat, choices, question), choices.draft)
    elif waits_to_repeat(opened.chat):
        _, index, kind = st.session_state[AGAIN]
        if opened.begin(lambda: _repeat(opened.chat, choices, index, kind)):
            del st.session_state[AGAIN]


def _run(chat: Chat, choices: ArenaChoices, question: str, repeats: int | None = None) -> Run:
    run = Run(chat, choices.context, question, choices.sessions, choices.sampling, choices.in_sequence, repeats)
    if choices.blind:
        run.turn.shuffle()
    return run


AGAIN = "again"
REPEATS = {
    "same": ("Ask again", "The same prompt and settings. A prefix cache has it now."),
    "order": ("In a new order", "The same chunks, shuffled, so that a prefix cache no longer helps."),
    "settings": ("With the settings on the left", "The same prompt, with the sidebar's current settings."),
}


def draw_again(chat: Chat, index: int) -> None:
    for kind, (label, help_text) in REPEATS.items():
        st.button(
            label,
            key=f"again-{kind}-{index}",
            type="tertiary",
            help=help_text,
            disabled=kind == "order" and len(chat.turns[index].context.chunks) < 2,
            on_click=_take_again,
            args=[chat, index, kind],
        )


def _take_again(chat: Chat, index: int, kind: str) -> None:
    st.session_state[AGAIN] = (chat.key, index, kind)


def waits_to_repeat(chat: Chat) -> bool:
    """Whether a turn of this chat is to be asked again and isn't under way yet."""
    return bool(st.session_state.get(AGAIN, ("",))[0] == chat.key)


def _repeat(chat: Chat, choices: ArenaChoices, index: int, kind: str) -> Run:
    turn = chat.turns[index]
    context = shuffled(turn.context) if kind == "order" else turn.context
    sampling = choices.sampling if kind == "settings" else turn.sampling
    again = dataclasses.replace(choices, context=context, sampling=sampling)
    return _run(chat, again, turn.question, repeats=chat.origin(index))


def shuffled(context: Context) -> Context:
    """Another order of its chunks, never the same. Needs two different ones."""
    while (other := tuple(random.sample(context.chunks, len(context.chunks)))) == context.chunks:
        pass
    return dataclasses.replace(context, chunks=other)


def draw_input(opened: OpenChat, choices: ArenaChoices, count: TokenCount | None) -> None:
    if waits_to_repeat(opened.chat):
        st.caption("Next in line: a repeat")
    if opened.chat.turns and not opened.busy and not opened.chat.continues(choices.context):
        st.caption("The context has changed: the next question starts a new conversation over it.")
    if count and not opened.busy:
        with st.bottom:  # in sight wherever the page is scrolled to
            _warn_of_length(opened.chat, choices, count)
    asked = {0: "Choose a contender first", 1: "Ask a question...", 2: "Ask a question to both LLMs..."}
    placeholder = asked.get(len(choices.sessions), "Ask a question to all LLMs...")
    draw_question_box(opened, placeholder, enabled=bool(choices.sessions))


def draw_context(choices: ArenaChoices) -> TokenCount | None:
    """With its tokens, if a contender that is up has counted them."""
    count, problem = _count(choices.context)
    with st.expander(summary(choices.context, count, _ratio(choices)), expanded=True, key="context-view"):
        st.html(context_html(choices.context, count))
        if problem:
            st.caption(f"Tokens can't be counted now. {problem}")
    return count


def _ratio(choices: ArenaChoices) -> float | None:
    """Of the chunks' tokens that are recomputed; None if nobody blends, or no share was chosen."""
    blends = any(session.server and session.server.blend for session in choices.sessions.values())
    ratio: float | None = choices.sampling.recomputing.get(RATIO) if blends else None
    return ratio


def _warn_of_length(chat: Chat, choices: ArenaChoices, count: TokenCount) -> None:
    """Before the question: for whom the context is too long, and how many chunks would fit."""
    said = _num_said(chat, choices.context)
    total = max(count.total, said)
    limits = {
        session.contender.title: session.server.max_model_len
        for session in choices.sessions.values()
        if session.server and session.server.max_model_len
    }
    too_short = {title: limit for title, limit in limits.items() if total + ROOM_FOR_QUESTION > limit}
    if not too_short:
        return
    told = ", ".join(f"{title} takes {limit:,}" for title, limit in too_short.items())
    what = "conversation" if said > count.total else "context"
    st.warning(f"The {what} has {total:,} tokens, and a question comes on top: {told}. They refuse longer prompts.")
    fitting = num_fitting(count, min(too_short.values()) - ROOM_FOR_QUESTION)
    num_chunks = len(choices.context.chunks)
    if fitting < num_chunks:
        st.button(
            f"Drop the last {num_chunks - fitting} chunks" if num_chunks - fitting > 1 else "Drop the last chunk",
            key="drop-chunks",
            on_click=state.choose_chunks,
            args=[[chunk.name for chunk in choices.context.chunks[:fitting]]],
        )


def _num_said(chat: Chat, context: Context) -> int:
    """Tokens of the conversation that a question over this context continues: the most that a contender reported."""
    turns = chat.conversation(context)
    figures = [answer.figures for answer in turns[-1].answers.values()] if turns else []
    return max(((one.num_prompt_tokens or 0) + (one.num_output_tokens or 0) for one in figures), default=0)


def _count(context: Context) -> tuple[TokenCount | None, str]:
    """By the first contender that is up, or the reason why not."""
    problem = "No contender is up."
    for session in state.chat_sessions().values():
        if session.up:
            try:
                return state.token_count(session, context), ""
            except ContenderError as error:
                problem = str(error)
    return None, problem


def draw_below(opened: OpenChat, index: int, is_live: bool, drawers: list[LiveDrawer]) -> None:
    """The vote on a blind turn; else how to ask the turn again, and more on it if wanted. While a turn is under way
    that is only the servers, at the place that they keep; those of a blind turn would show who is who.
    """
    chat, turn = opened.chat, opened.chat.turns[index]
    if turn.is_blind:
        if not is_live:
            draw_ballot(opened, index)
        return
    if turn.vote:
        st.caption(f"Your vote: {vote_text(turn, turn.vote)}")
    with st.container(horizontal=True, key=f"again-{index}"):
        if not is_live:
            draw_again(chat, index)
    known = [answer for name, answer in turn.answers.items() if name in state.chat_sessions() and not is_live]
    answers = [answer for answer in known if answer.figures.num_prompt_tokens is not None]
    with st.container(horizontal=True):
        servers = st.toggle("See the servers", key=f"servers-{chat.key}-{index}")
        tokens = bool(answers) and st.toggle("What was reused, token by token", key=f"tokens-{chat.key}-{index}")
        copies = not is_live and st.toggle(
            "Copy", key=f"copy-{chat.key}-{index}", help="The answers and the requests, as text."
        )
    if servers:
        draw_drawer(opened, index, drawers)
    if tokens:
        draw_tokens(chat, index, answers)
    if copies:
        draw_copies(chat, index)


VOTES_WITHOUT_BEST = {"tie": "Tie", "bad": "All bad"}


def draw_ballot(opened: OpenChat, index: int) -> None:
    """Which side is best; the first vote shows who answered."""
    turn = opened.chat.turns[index]
    choices = [(f"{side} is best", Vote("best", answer.contender.name)) for side, answer in turn.sides()]
    choices += [(VOTES_WITHOUT_BEST["tie"], Vote("tie")), (VOTES_WITHOUT_BEST["bad"], Vote("bad"))]
    with st.container(horizontal=True, key=f"vote-{index}"):
        for number, (label, vote) in enumerate(choices):
            st.button(label, key=f"vote-{index}-{number}", on_click=opened.vote, args=[index, vote])


def vote_text(turn: Turn, vote: Vote) -> str:
    found = (f"{side}, {answer.contender.title}" for side, answer in turn.sides() if answer.contender.name == vote.best)
    return next(found, VOTES_WITHOUT_BEST.get(vote.kind, vote.best))


def draw_tally(chat: Chat) -> None:
    """Of all votes that are kept, whichever chat they were given in; of this chat's if none are."""
    file = state.chat_file()
    ballots = ballots_of(chat) if file.problem else file.ballots()
    if not ballots:
        return
    with st.popover(f"Votes: {len(ballots)}", key="votes", icon=":material/how_to_vote:"):
        st.caption("Blind votes on this page. Preferred: how likely the answer is taken to be better than a rival's.")
        for group in standings(ballots):
            st.table(
                [
                    {
                        "setting": one.setting,
                        "preferred": f"{one.share:.0%} ({one.low:.0%} to {one.high:.0%})",
                        "votes": one.num_votes,
                        "best": one.num_best,
                        "tie": one.num_ties,
                        "all bad": one.num_bad,
                    }
                    for one in group
                ]
            )


def draw_drawer(opened: OpenChat, index: int, drawers: list[LiveDrawer]) -> None:
    """No fragment runs while a question is under way: whoever watches it updates `drawers`."""
    chat = opened.chat
    wanted = st.text_input("Only figures with", key=f"wanted-{chat.key}-{index}", placeholder="such as: ms")
    if opened.busy:
        drawers.append(LiveDrawer(chat.turns[index], wanted))
    else:
        draw_servers(chat.turns[index], wanted)


def ask_servers(turn: Turn) -> list[tuple[Service, Future[Watched]]]:
    """What a turn's contenders do, and the LMCache servers behind them."""
    sessions = [session for name, session in state.chat_sessions().items() if name in turn.answers]
    return [
        *((session.contender, session.watch(turn.request_id)) for session in sessions),
        *((session.server, session.watch()) for session in state.store_sessions()),
    ]


def servers_html(asked: Sequence[tuple[Service, Future[Watched]]], wanted: str) -> str:
    """Waits for all of them. `wanted`: which of a line's figures are shown."""
    cards = []
    for server, future in asked:
        watched, problem = None, ""
        try:
            watched = future.result()
        except ContenderError as error:
            problem = str(error)
        cards.append(server_html(server.name, server.title, watched, problem, wanted))
    return f'<div class="ka-servers">{"".join(cards)}</div>'


@st.fragment(run_every=WATCH_S)
def draw_servers(turn: Turn, wanted: str) -> None:
    st.html(servers_html(ask_servers(turn), wanted))


class LiveDrawer:
    """The servers while a question is under way. Never waits, since the answers go on."""

    def __init__(self, turn: Turn, wanted: str) -> None:
        self._turn, self._wanted = turn, wanted
        self._place = st.empty()
        self._ask()

    def _ask(self) -> None:
        self._asked, self._is_drawn = ask_servers(self._turn), False
        self._due_s = time.monotonic() + WATCH_S

    def keep_up(self) -> None:
        """Draws what has come, and asks again when it is time."""
        if not all(future.done() for _, future in self._asked):
            return
        if not self._is_drawn:
            self._place.html(servers_html(self._asked, self._wanted))
            self._is_drawn = True
        if time.monotonic() > self._due_s:
            self._ask()


def keep_up(drawers: Sequence[LiveDrawer]) -> None:
    for drawer in drawers:
        drawer.keep_up()


SCORES_HINT = (
    "Recomputed tokens also tell by what score the policy chose them, where it goes by one, and which chunk they lean "
    "on: switch on *Show probabilities* on the left, and ask again *With the settings on the left*."
)


def draw_tokens(chat: Chat, index: int, answers: list[Answer]) -> None:
    """Each contender's prompt of a turn, coloured by where its KV came from."""
    if any(_keeps_scores_back(chat.turns[index], answer) for answer in answers):
        st.caption(SCORES_HINT)
    for start in range(0, len(answers), NUM_TOKEN_COLUMNS):
        for answer, column in zip(answers[start:], st.columns(min(len(answers), NUM_TOKEN_COLUMNS)), strict=False):
            with column:
                try:
                    st.html(_tokens_html(chat, index, answer))
                except ContenderError as error:
                    st.caption(str(error))


def _keeps_scores_back(turn: Turn, answer: Answer) -> bool:
    """Whether its recomputed tokens have scores that nobody asked for."""
    server = state.chat_sessions()[answer.contender.name].server
    tells_scores = server is not None and server.blend is not None and server.blend.tells_scores
    return tells_scores and bool(answer.figures.recomputed) and not turn.sampling.probabilities


def _tokens_html(chat: Chat, index: int, answer: Answer) -> str:
    """Raises `ContenderError`."""
    turn, figures = chat.turns[index], answer.figures
    session = state.chat_sessions()[answer.contender.name]
    tokens = state.prompt_tokens(session, chat.asked(index, answer.contender.name))
    places = []
    for chunk, span in zip(turn.context.chunks, state.token_count(session, turn.context).spans, strict=True):
        if span.start is not None and span.end is not None:
            places += [(span.start, chunk.name), (span.end, "")]
    spans = [*figures.spans, *(Span(start, end, "recomputed") for start, end in figures.recomputed or ())]
    return tokens_html(answer.contender.title, tokens, kinds_of(len(tokens), spans), places, figures.scores)


def draw_examples(chat: Chat) -> None:
    examples = load_examples(state.page_settings().data_dir, state.chunk_files().keys())
    if not examples:
        st.caption("Pick chunks on the left, then ask below.")
        return
    st.caption("Pick chunks on the left and ask below, or begin with one of these; it brings its chunks along.")
    draw_offered("example", [(one.question, partial(_take_example, chat, one)) for one in examples])


def draw_follow_ups(opened: OpenChat, choices: ArenaChoices) -> None:
    """The folder's questions that continue the last one."""
    if opened.busy:
        return
    asked = [turn.question for turn in opened.chat.conversation(choices.context)]
    found = follow_ups(state.page_settings().data_dir, state.chunk_files().keys(), asked)
    draw_offered("follow-up", [(question, partial(put_question, opened.chat, question)) for question in found])


def draw_offered(key: str, questions: Sequence[tuple[str, Callable[[], None]]]) -> None:
    """Each with what a click on it does."""
    for index, (column, (question, take)) in enumerate(zip(st.columns(NUM_EXAMPLES), questions, strict=False)):
        column.button(literal(question), key=f"{key}-{index}", width="stretch", on_click=take)


def _take_example(chat: Chat, example: Example) -> None:
    state.choose_chunks(example.chunks)
    put_question(chat, example.question)


main()
