"""A chat: turns that each contender answers on its own, and the messages that its next answer follows from.

Pure data: no HTTP, no Streamlit. Invariants:
- an answer's text grows only through `Answer.apply`, and not after the answer is over;
- the turns since the last change of context are one conversation: the first carries the chunks, later ones only
  their question, and each contender sees its own answers in it;
- a turn without text from a contender (it was down, or interrupted before its first token) is left out of that
  contender's conversation, so roles always alternate, and the chunks go with the first turn that is left;
- a turn that repeats another is an experiment: it follows on from what that one did, and nothing follows on from it.

Every field can be written as JSON and read back: `chat_file.py` keeps chats that way.
"""

from __future__ import annotations

import dataclasses
import random
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, Literal

from contender_api import Sampling
from figures import Done, Event, Failed, Figures, FirstToken, Sent, Text
from kvarena.documents import Document, TextChunk, build_messages
from settings import Contender

State = Literal["waiting", "streaming", "done", "interrupted", "failed"]


@dataclass(frozen=True)
class Context:
    """What the question is asked about. Equal contexts give equal prompts.

    `notes`: a server with KV slots adds the notes of its folder that fit a topic.
    """

    system: str = ""
    chunks: tuple[TextChunk, ...] = ()
    separator: str = ""
    notes: bool = False

    @property
    def texts(self) -> list[str]:
        return [chunk.text for chunk in self.chunks]


@dataclass
class Answer:
    """One contender's answer in one turn. `started_s` is on `time.perf_counter`, None until it was asked. `request` is
    what was sent, without the messages, which the chat has.
    """

    contender: Contender
    text: str = ""
    state: State = "waiting"
    error: str = ""
    figures: Figures = field(default_factory=Figures)
    finish_reason: str = ""
    started_s: float | None = None
    request: dict[str, Any] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.state in ("done", "interrupted", "failed")

    def start(self) -> None:
        self.started_s = time.perf_counter()

    def apply(self, event: Event) -> None:
        if self.over:
            return
        match event:
            case Sent(request):
                self.request = dict(request)
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


@dataclass(frozen=True)
class Vote:
    """`best` names the contender whose answer was chosen; empty for a tie and for "all bad"."""

    kind: Literal["best", "tie", "bad"]
    best: str = ""


@dataclass
class Turn:
    """`request_id` was sent as `X-Request-Id` and is in the servers' logs. `repeats` is the index of the turn that it
    asks again, `asked_s` a Unix time, `order` the order of a blind turn's answers.
    """

    question: str
    context: Context
    answers: dict[str, Answer]
    sampling: Sampling = field(default_factory=Sampling)
    repeats: int | None = None
    request_id: str = ""
    asked_s: float = field(default_factory=time.time)
    in_sequence: bool = False
    order: tuple[str, ...] = ()
    vote: Vote | None = None

    def shuffle(self) -> None:
        """Makes it a blind turn, if it has several answers."""
        if len(self.answers) > 1:
            self.order = tuple(random.sample(list(self.answers), len(self.answers)))

    @property
    def is_blind(self) -> bool:
        """Whether the page hides who answered: until the vote, or until an answer failed so that there can be none."""
        lost = any(answer.state in ("failed", "interrupted") for answer in self.answers.values())
        return bool(self.order) and self.vote is None and not lost

    @property
    def can_vote(self) -> bool:
        return self.is_blind and all(answer.over for answer in self.answers.values())

    def sides(self) -> list[tuple[str, Answer]]:
        """The answers in the order of the page, each with its letter; no letter where the turn was never blind."""
        if not self.order:
            return [("", answer) for answer in self.answers.values()]
        return [(letter, self.answers[name]) for letter, name in zip(ascii_uppercase, self.order, strict=False)]

    @classmethod
    def ask(
        cls,
        question: str,
        context: Context,
        contenders: Iterable[Contender],
        sampling: Sampling,
        repeats: int | None = None,
    ) -> Turn:
        return cls(question, context, {c.name: Answer(c) for c in contenders}, sampling, repeats)


@dataclass(frozen=True)
class Draft:
    """How a chat's page is set, whether or not anything was asked: the next question's context, the controls by their
    keys, and the uploaded documents, used or not.
    """

    context: Context
    controls: dict[str, Any] = field(default_factory=dict)
    documents: tuple[Document, ...] = ()


@dataclass
class Chat:
    """The turns of one chat, oldest first. `draft` restores the page after a reload."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    turns: list[Turn] = field(default_factory=list)
    draft: Draft | None = None

    def begins_context(self, index: int) -> bool:
        """Whether a turn starts a conversation of its own."""
        turn = self.turns[index]
        return turn.repeats is None and not self.before(index).continues(turn.context)

    def asked(self, index: int, contender: str) -> list[dict[str, str]]:
        """The messages that a turn sent to this contender."""
        turn = self.turns[index]
        return self.over(index, turn.context).messages(contender, turn.context, turn.question)

    def before(self, index: int) -> Chat:
        """The chat as it was when a turn was asked."""
        return dataclasses.replace(self, turns=self.turns[:index])

    def over(self, index: int, context: Context) -> Chat:
        """The chat that a turn, or the turn that it repeats, followed on from, as if held over another context."""
        return dataclasses.replace(
            self, turns=[dataclasses.replace(turn, context=context) for turn in self.followed(index)]
        )

    def followed(self, index: int) -> list[Turn]:
        """The turns that a turn, or the one that it repeats, follows on from."""
        at = self.origin(index)
        return self.before(at).conversation(self.turns[at].context)

    @property
    def told(self) -> list[Turn]:
        """The turns that aren't repeats of others."""
        return [turn for turn in self.turns if turn.repeats is None]

    def continues(self, context: Context) -> bool:
        """Whether a question over `context` would go on with the last conversation."""
        return bool(self.told) and self.told[-1].context == context

    def origin(self, index: int) -> int:
        """The turn itself, or the one that it repeats."""
        repeats = self.turns[index].repeats
        return index if repeats is None else repeats

    def again_text(self, index: int) -> str:
        """How a repeat differs from the turn that it repeats."""
        turn, origin = self.turns[index], self.turns[self.origin(index)]
        changes = []
        if turn.context != origin.context:
            changes.append("the chunks in a new order")
        if turn.sampling != origin.sampling:
            changes.append("other settings")
        return f"Asked again: {' and '.join(changes) or 'the same prompt and settings'}"

    def conversation(self, context: Context) -> list[Turn]:
        """The turns that a question over `context` follows on from."""
        turns: list[Turn] = []
        for turn in reversed(self.told):
            if turn.context != context:
                break
            turns.insert(0, turn)
        return turns

    def missed(self, index: int) -> dict[str, int]:
        """For each contender of a turn, how many of the earlier turns it didn't answer although others did."""
        followed = self.over(index, self.turns[index].context).turns
        earlier = [{n for n, answer in turn.answers.items() if answer.text.strip()} for turn in followed]
        return {
            contender: sum(bool(names) and contender not in names for names in earlier)
            for contender in self.turns[index].answers
        }

    def messages(self, contender: str, context: Context, question: str) -> list[dict[str, str]]:
        """The request's messages for this contender, with its own earlier answers."""
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
