"""Conversations: one chat on KV slots, each message answered with the slots and without, side by side.

Draws only; `chat_session.py` does all HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial
from html import escape
from pathlib import Path

import streamlit as st

import state
from chat_session import SlotSession
from chat_view import draw_notices, draw_question_box, draw_turns, put_question, take_asked, waiting_question, watch
from contender_api import ContenderError, Message
from export import draw_export
from runs import OpenChat, Run
from settings import SLOTS_CONTENDER
from sidebar import ConversationChoices, draw_conversation_sidebar
from slots import CACHED, NextTopic, SlotChat, SlotTable, next_topic_html, slots_html, topic_name

START_COMMAND = f"./run-server.sh --contenders {SLOTS_CONTENDER}"
NUM_HISTORY_LINES = 3
SERVER_CHOOSES = "The server finds it"
FORCED, CHOSEN, FORETOLD = "forced-topic", "chosen-topic", "foretold-topic"
TOPIC_WIDTH_PX = 220
FOLLOW_S = 0.3
FORETELL_S = 1.0
typed_text = st.components.v2.component("typed_text", js=(Path(__file__).parent.parent / "typed.js").read_text())


def main() -> None:
    st.html('<div class="ka-title">Conversations<small>a KV slot per topic, only new tokens prefilled</small></div>')
    try:
        opened = state.open_chat("conversation")
        choices = draw_conversation_sidebar(opened)
    except ValueError as error:
        st.error(str(error))
        st.stop()
    chat = opened.chat
    assert isinstance(chat, SlotChat)
    draw_notices(opened)
    ask(opened, chat, choices)
    slots = draw_slots(opened, chat) if choices.is_up else None
    if slots is None:
        draw_not_running()
    if chat.turns:
        draw_export(chat, "conversation")
    view = draw_turns(opened, lambda index, is_live: None if is_live else draw_topic(opened, chat, index))
    message = _message_key(chat)
    if choices.is_up and not opened.busy and not waiting_question(chat):
        _carry_choice(chat, message)
        with st.bottom:
            draw_next_topic(chat, choices, message)
    placeholder = "Ask, change the topic, and come back to it"
    draw_question_box(opened, placeholder, enabled=choices.is_up, on_ask=lambda: _keep_choice(message))
    if (run := opened.run) and view and view.turn is run.turn:
        watch(opened, run, view, also=slots.follow if slots else lambda: None)


def ask(opened: OpenChat, chat: SlotChat, choices: ConversationChoices) -> None:
    question = waiting_question(chat)
    if question and choices.is_up and not opened.busy:
        sampling = choices.sampling(chat.name(choices.context), st.session_state.get(FORCED, ""))
        make_run = partial(Run, chat, choices.context, question, choices.sessions, sampling, choices.in_sequence)
        if take_asked(opened, make_run, choices.draft):
            st.session_state.pop(FORCED, None)


class SlotsView:
    """The slots' place on the page. `follow` updates it while an answer is under way, without waiting."""

    def __init__(self, session: SlotSession, chat: SlotChat) -> None:
        self._session, self._chat = session, chat
        self._place = st.empty()
        self._asked: Future[SlotTable] | None = None
        self._asked_s = 0.0

    def draw(self) -> SlotTable | None:
        """Asks and waits; None when the server doesn't say."""
        try:
            table = self._session.slots().result()
        except ContenderError as error:
            self._place.caption(str(error))
            return None
        self.show(table)
        return table

    def follow(self) -> None:
        if self._asked is None and time.monotonic() - self._asked_s >= FOLLOW_S:
            self._asked, self._asked_s = self._session.slots(), time.monotonic()
        if self._asked is not None and self._asked.done():
            asked, self._asked = self._asked, None
            if asked.exception() is None:
                self.show(asked.result())

    def show(self, table: SlotTable) -> None:
        self._place.html(slots_html(table, self._chat.conversations))


@st.fragment(run_every=FORETELL_S)
def draw_next_topic(chat: SlotChat, choices: ConversationChoices, message: str) -> None:
    """Where the message being typed would go, or the topic chosen for it."""
    text = typed_text(key=f"typed-{message}", default={"text": ""}, on_text_change=lambda: None)["text"]
    topics = chat.topics()
    with st.container(horizontal=True, vertical_alignment="center", key="next-topic"):
        place = st.empty()
        st.selectbox(
            "The next message's topic",
            [SERVER_CHOOSES, *topics],
            key=_choice_key(message),
            accept_new_options=True,
            label_visibility="collapsed",
            width=TOPIC_WIDTH_PX,
            help="Choose a topic of this conversation, or write a new one.",
        )
        chosen = _chosen_topic(message)
        st.session_state[CHOSEN] = chat.key, chosen
        if chosen:
            place.html(next_topic_html(NextTopic(chosen, chosen not in topics), is_chosen=True))
        else:
            place.html(_foretold_html(chat, choices, text))


def foretold_topic(session: SlotSession, messages: Sequence[Message], conversation: str) -> NextTopic | None:
    """Where the last message would go. None: the server hasn't said yet, so call it again. Each message is asked once;
    an earlier one is given up. Raises `ContenderError`.
    """
    wanted = session.contender.name, conversation, list(messages)
    for_what, asked = st.session_state.get(FORETOLD, (None, None))
    if for_what != wanted:
        if asked:
            asked.cancel()
        asked = session.topic(messages, conversation)
        st.session_state[FORETOLD] = wanted, asked
    wait([asked], state.FORETELL_WAIT_S)
    return asked.result() if asked.done() else None


def _foretold_html(chat: SlotChat, choices: ConversationChoices, text: str) -> str:
    if not text:
        return next_topic_html(None)
    session = next(iter(choices.sessions.values()))
    messages = chat.messages(session.contender.name, choices.context, text)
    try:
        return next_topic_html(foretold_topic(session, messages, chat.name(choices.context)))
    except ContenderError as error:
        return next_topic_html(None, str(error))


def _message_key(chat: SlotChat) -> str:
    """For the controls of one message, which begin anew after each turn. Taken when they are drawn, since another page
    may continue the chat before the message is sent.
    """
    return f"{chat.key}-{chat.turns[-1].request_id if chat.turns else ''}"


def _choice_key(message: str) -> str:
    return f"next-topic-{message}"


def _chosen_topic(message: str) -> str:
    """Empty: the server finds it."""
    wanted = st.session_state.get(_choice_key(message))
    return "" if wanted in (None, SERVER_CHOOSES) else topic_name(wanted)


def _carry_choice(chat: SlotChat, message: str) -> None:
    """The text in the box stays when another page continues the chat, and so does the topic chosen for it."""
    chat_key, chosen = st.session_state.get(CHOSEN, ("", ""))
    if chosen and chat_key == chat.key:
        st.session_state.setdefault(_choice_key(message), chosen)


def _keep_choice(message: str) -> None:
    """For the message that was just sent, which may have to wait."""
    st.session_state[FORCED] = _chosen_topic(message)
    st.session_state.pop(CHOSEN, None)


def draw_topic(opened: OpenChat, chat: SlotChat, index: int) -> None:
    """The last message's topic, which can be corrected: the message is then asked again in the other one."""
    turns = [answer.figures.slot_turn for answer in chat.turns[index].answers.values()]
    topic = next((turn.topic for turn in turns if turn), None)
    if topic is None or index + 1 < len(chat.turns):
        return
    key = f"topic-{chat.key}-{index}-{topic}"
    topics = list(dict.fromkeys([topic, *chat.topics()]))
    st.selectbox(
        "Topic",
        topics,
        key=key,
        accept_new_options=True,
        on_change=_correct_topic,
        args=[opened, chat, index, key],
        help="Choose another one, or write a new one, and the message is asked again in it.",
    )


def _correct_topic(opened: OpenChat, chat: SlotChat, index: int, key: str) -> None:
    """Only of the last message: another page may have continued meanwhile."""
    topic = topic_name(st.session_state[key] or "")
    if topic and index + 1 == len(chat.turns) and not opened.busy:
        st.session_state[FORCED] = topic
        put_question(chat, chat.take_back().question)


def draw_slots(opened: OpenChat, chat: SlotChat) -> SlotsView:
    """The slots, what the turns did to them, and what they saved so far."""
    with st.container(key="slots"):
        view = SlotsView(state.slot_sessions()[CACHED.name], chat)
        if (table := view.draw()) and not opened.busy:
            chat.note_slots(table)
            view.show(table)  # only now is it known which slots are this chat's
        if told := _history_html(chat) + _saved_html(chat):
            st.html(told)
    return view


def draw_not_running() -> None:
    st.info(
        f"This page needs the contender {SLOTS_CONTENDER}, which isn't running. Start it alone or with others:",
        icon=":material/power_off:",
    )
    st.code(START_COMMAND, language="sh")


def _saved_html(chat: SlotChat) -> str:
    saved = chat.saved()
    if not saved.num_turns:
        return ""
    turns = f"{saved.num_turns} turn{'' if saved.num_turns == 1 else 's'}"
    attributes = f'data-ms="{saved.first_token_ms:.1f}" data-tokens="{saved.num_tokens}" data-tone="{saved.tone}"'
    seconds = f"{abs(saved.first_token_ms) / 1000:,.2f} s"
    effects = {"gain": f"saved {seconds} until", "tie": "made no difference to", "loss": f"cost {seconds} until"}
    return (
        f'<div class="ka-speed ka-tone-{saved.tone}" data-testid="saved" {attributes}>Slots {effects[saved.tone]} '
        f"the first tokens of {turns}, and saved the prefill of {saved.num_tokens:,} tokens</div>"
    )


def _history_html(chat: SlotChat) -> str:
    lines = escape(" · ".join(chat.slot_history[-NUM_HISTORY_LINES:]))
    return f'<div class="ka-notice" data-testid="slot-history">{lines}</div>' if lines else ""


main()
