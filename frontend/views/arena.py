"""Arena: the same question to every contender, side by side. Draws only; `chat_session.py` does all HTTP.

A script run reads the choices, draws the context and the chat, and then watches the question in progress, if any.
"""

from __future__ import annotations

import streamlit as st

import state
from chat import Context
from contender_api import ContenderError
from context_view import TokenCount, context_html, summary
from examples import Example, follow_ups, load_examples
from question_box import asked_question, draw_question_box, put_question
from runs import OpenChat, Run
from sidebar import ArenaChoices, choose_chunks, draw_arena_sidebar
from turns_view import draw_turns, watch

NUM_EXAMPLES = 4


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
    draw_context(choices.context)
    ask(opened, choices)
    if not opened.chat.turns:
        draw_examples()
    view = draw_turns(opened)
    draw_follow_ups(opened, choices)
    draw_input(opened, choices)
    if opened.run and view:
        watch(opened, opened.run, view)


def ask(opened: OpenChat, choices: ArenaChoices) -> None:
    """Turns the question that was typed or clicked into a run, with the choices that are on the page now."""
    question = asked_question()
    if question and choices.sessions and not opened.busy:
        opened.run = Run.of_question(
            opened.chat,
            choices.context,
            question,
            choices.sessions,
            choices.sampling,
            choices.in_sequence,
        )


def draw_input(opened: OpenChat, choices: ArenaChoices) -> None:
    if opened.chat.turns and not opened.busy and not opened.chat.continues(choices.context):
        st.caption("The context has changed: the next question starts a new conversation over it.")
    placeholder = "Ask about the chunks" if choices.sessions else "Choose a contender first"
    draw_question_box(opened, placeholder, enabled=bool(choices.sessions))


def draw_context(context: Context) -> None:
    count, problem = _count(context)
    with st.expander(summary(context, count), expanded=True, key="context-view"):
        st.html(context_html(context, count))
        if problem:
            st.caption(f"Tokens can't be counted now. {problem}")


def _count(context: Context) -> tuple[TokenCount | None, str]:
    """By the first contender that is up; the reason why not, otherwise."""
    problem = "No contender is up."
    for session in state.chat_sessions().values():
        if session.up:
            try:
                return state.token_count(session, context), ""
            except ContenderError as error:
                problem = str(error)
    return None, problem


def draw_examples() -> None:
    examples = load_examples(state.page_settings().data_dir, state.chunk_files().keys())
    if not examples:
        st.caption("Pick chunks on the left, then ask below.")
        return
    st.caption("Pick chunks on the left and ask below, or begin with one of these; it brings its chunks along.")
    for index, (column, example) in enumerate(zip(st.columns(NUM_EXAMPLES), examples, strict=False)):
        column.button(
            example.question,
            key=f"example-{index}",
            width="stretch",
            on_click=_take_example,
            args=[example],
        )


def draw_follow_ups(opened: OpenChat, choices: ArenaChoices) -> None:
    """Questions of the folder's that go on from the last one."""
    if opened.busy:
        return
    asked = [turn.question for turn in opened.chat.conversation(choices.context)]
    found = follow_ups(state.page_settings().data_dir, state.chunk_files().keys(), asked)[:NUM_EXAMPLES]
    for index, (column, question) in enumerate(zip(st.columns(NUM_EXAMPLES), found, strict=False)):
        column.button(question, key=f"follow-up-{index}", width="stretch", on_click=put_question, args=[question])


def _take_example(example: Example) -> None:
    choose_chunks(example.chunks)
    put_question(example.question)


main()
