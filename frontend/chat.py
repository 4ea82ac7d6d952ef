"""A chat: turns that each contender answers on its own, and the messages that its next answer follows from.

Pure data: no HTTP, no Streamlit. Invariants:
- an answer's text grows only through `Answer.apply`, and not after the answer is over;
- the turns since the last change of context are one conversation: the first carries the chunks, later ones only
  their question, and each contender sees its own answers in it;
- a turn without text from a contender (it was down, or interrupted before its first token) is left out of that
  contender's conversation, so roles always alternate, and the chunks go with the first turn that is left.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from figures import Done, Event, Failed, Figures, FirstToken, Text
from kvarena.documents import TextChunk, build_messages
from settings import Contender

State = Literal["waiting", "streaming", "done", "interrupted", "failed"]


@dataclass(frozen=True)
class Context:
    """What the question is asked about. Equal contexts give equal prompts."""

    system: str = ""
    chunks: tuple[TextChunk, ...] = ()
    separator: str = ""

    @property
    def texts(self) -> list[str]:
        return [chunk.text for chunk in self.chunks]


@dataclass
class Answer:
    """One contender's answer in one turn. `started_s` is on `time.perf_counter`, None until it was asked."""

    contender: Contender
    text: str = ""
    state: State = "waiting"
    error: str = ""
    figures: Figures = field(default_factory=Figures)
    finish_reason: str = ""
    started_s: float | None = None

    @property
    def over(self) -> bool:
        return self.state in ("done", "interrupted", "failed")

    def start(self) -> None:
        self.started_s = time.perf_counter()

    def apply(self, event: Event) -> None:
        if self.over:
            return
        match event:
            case FirstToken(first_token_ms):
                self.state = "streaming"
                self.figures = dataclasses.replace(self.figures, first_token_ms=first_token_ms)
            case Text(text):
                self.text += text
            case Done(figures, finish_reason):
                self.state, self.figures, self.finish_reason = "done", figures, finish_reason
            case Failed(message):
                self.state, self.error = "failed", message

    def interrupt(self) -> None:
        if not self.over:
            self.state = "interrupted"


@dataclass
class Turn:
    question: str
    context: Context
    answers: dict[str, Answer]

    @classmethod
    def ask(cls, question: str, context: Context, contenders: Iterable[Contender]) -> Turn:
        return cls(question, context, {c.name: Answer(c) for c in contenders})


@dataclass
class Chat:
    """The turns of one chat, oldest first."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    turns: list[Turn] = field(default_factory=list)

    def begins_context(self, index: int) -> bool:
        """Whether a turn starts a conversation of its own."""
        return index == 0 or self.turns[index].context != self.turns[index - 1].context

    def continues(self, context: Context) -> bool:
        """Whether a question over `context` would go on with the last conversation."""
        return bool(self.turns) and self.turns[-1].context == context

    def conversation(self, context: Context) -> list[Turn]:
        """The turns that a question over `context` follows on from."""
        turns: list[Turn] = []
        for turn in reversed(self.turns):
            if turn.context != context:
                break
            turns.insert(0, turn)
        return turns

    def messages(self, contender: str, context: Context, question: str) -> list[dict[str, str]]:
        """The request's messages for this contender, its own earlier answers in them."""
        answered = [
            (turn.question, turn.answers[contender].text)
            for turn in self.conversation(context)
            if contender in turn.answers and turn.answers[contender].text.strip()
        ]
        first = answered[0][0] if answered else question
        messages = build_messages(context.system, context.texts, first, context.separator)
        for index, (asked, answer) in enumerate(answered):
            if index:
                messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer.strip()})
        if answered:
            messages.append({"role": "user", "content": question})
        return messages
