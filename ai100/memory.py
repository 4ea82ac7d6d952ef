"""Conversations by their name, or by their history where a client names none.

What a client sends is the truth: turns that it sends otherwise than they are remembered are forgotten. A client that
names its conversation and sends a question alone goes on where the conversation is.
"""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ai100.conversation import Exchange, Message, Prompt, Turn, text_of
from ai100.topics import Spoken, Topics

MAX_CONVERSATIONS = 1024
MAX_TOKENISED = 8
"""How many of a topic's turns keep their tokens: a client may go back and ask otherwise."""


@dataclass(eq=False)
class Conversation:
    """`id` is ours: two clients that choose one name under two salts have two conversations."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    system: tuple[Message, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    name: tuple[str, str] | None = None
    histories: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Begun:
    """A turn that was begun, and what came before it."""

    conversation: Conversation
    system: tuple[Message, ...]
    earlier: tuple[Turn, ...]
    turn: Turn


class ConversationMemory:
    """Thread-safe. Keeps the last `max_conversations`. `question_in` a message is what tells its topic."""

    def __init__(
        self,
        topics: Topics,
        max_conversations: int = MAX_CONVERSATIONS,
        question_in: Callable[[str], str] = lambda message: message,
    ) -> None:
        self._topics = topics
        self._question_in = question_in
        self._max_conversations = max_conversations
        self._lock = threading.Lock()
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()
        self._named: dict[tuple[str, str], Conversation] = {}
        self._by_history: dict[str, list[Conversation]] = {}

    def begin(self, exchange: Exchange, salt: str, name: str | None, *, keep: bool = True) -> Begun:
        """The next turn of the conversation that this belongs to. Without `keep` it is a turn on the side: nobody
        remembers it.
        """
        with self._lock:
            conversation = self._find(exchange, salt, name) if keep else Conversation()
            goes_on_alone = name is not None and not exchange.past
            if not goes_on_alone:
                conversation.turns = self._aligned(conversation.turns, exchange.past)
            if exchange.system or not goes_on_alone:
                conversation.system = exchange.system
            earlier = tuple(conversation.turns)
            turn = Turn(self._topic_of(exchange.question, earlier), exchange.question)
            conversation.turns.append(turn)
            if keep:
                self._keep(conversation, salt)
            return Begun(conversation, conversation.system, earlier, turn)

    def named(self, salt: str, name: str) -> str:
        """The id of a conversation, which need not have turns."""
        with self._lock:
            conversation = self._by_name(salt, name)
            self._keep(conversation, salt)
            return conversation.id

    def remember(self, begun: Begun, prompt: Prompt, answer: str, answer_ids: Sequence[int]) -> None:
        """The turn has ended with this answer."""
        turn = begun.turn
        with self._lock:
            for earlier in [earlier for earlier in begun.earlier if earlier.topic == turn.topic][:-MAX_TOKENISED]:
                earlier.token_ids, earlier.text = (), ""
            turn.starts_anew = prompt.reset_reason is not None
            turn.token_ids, turn.text = (*prompt.token_ids, *answer_ids), prompt.text + answer
            turn.answer = {"role": "assistant", "content": answer}

    def drop(self, begun: Begun) -> None:
        """The turn has ended without an answer: it never was."""
        with self._lock:
            turns = begun.conversation.turns
            if begun.turn in turns:
                turns.remove(begun.turn)

    def _topic_of(self, question: Message, earlier: Sequence[Turn]) -> str:
        said = [
            Spoken(turn.topic, self._question_in(text_of(turn.question)), text_of(turn.answer) if turn.answer else "")
            for turn in earlier
        ]
        return self._topics.topic_of(self._question_in(text_of(question)), said)

    def _aligned(self, remembered: Sequence[Turn], past: Sequence[tuple[Message, Message]]) -> list[Turn]:
        """The client's turns: as remembered up to the first that differs, and from there on anew."""
        turns: list[Turn] = []
        for (question, answer), turn in zip(past, remembered, strict=False):
            if not _is_same(turn, question, answer):
                break
            turns.append(turn if turn.answer == answer else replace(turn, question=question, answer=answer))
        for question, answer in past[len(turns) :]:
            turns.append(Turn(self._topic_of(question, turns), question, answer))
        return turns

    def _find(self, exchange: Exchange, salt: str, name: str | None) -> Conversation:
        if name is not None:
            return self._by_name(salt, name)
        asked = [question for question, _ in exchange.past]
        candidates = self._by_history.get(_history(salt, exchange.system, asked), ()) if asked else ()
        for conversation in reversed(candidates):
            pairs = zip(exchange.past, conversation.turns, strict=False)
            if all(_is_same(turn, question, answer) for (question, answer), turn in pairs):
                return conversation
        return Conversation()

    def _by_name(self, salt: str, name: str) -> Conversation:
        return self._named.get((salt, name)) or Conversation(name=(salt, name))

    def _keep(self, conversation: Conversation, salt: str) -> None:
        self._conversations[conversation.id] = conversation
        self._conversations.move_to_end(conversation.id)
        if conversation.name is not None:
            self._named[conversation.name] = conversation
        else:
            history = _history(salt, conversation.system, [turn.question for turn in conversation.turns])
            if history not in conversation.histories:
                conversation.histories.add(history)
                self._by_history.setdefault(history, []).append(conversation)
        while len(self._conversations) > self._max_conversations:
            self._forget(self._conversations.popitem(last=False)[1])

    def _forget(self, conversation: Conversation) -> None:
        if conversation.name is not None:
            del self._named[conversation.name]
        for history in conversation.histories:
            self._by_history[history].remove(conversation)
            if not self._by_history[history]:
                del self._by_history[history]


def _is_same(turn: Turn, question: Message, answer: Message) -> bool:
    """A client may have cut an answer, at a stop string or when its reader had enough."""
    if turn.answer is None or text_of(turn.question) != text_of(question):
        return False
    return text_of(turn.answer).startswith(text_of(answer))


def _history(salt: str, system: Sequence[Message], questions: Sequence[Message]) -> str:
    said = [salt, [text_of(message) for message in system], [text_of(message) for message in questions]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
