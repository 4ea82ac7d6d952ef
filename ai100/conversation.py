"""Conversations, and which token ids a turn becomes: the chat template's text of its topic so far and the new question.

Other topics of the conversation are left out. Notes that were chosen (`notes.py`) stand in the system message or
before a turn's question. A prompt depends on the turns before it and never on what is in a slot: with and without the
cache it is the same token ids.

| the topic's earlier turns | the prompt's token ids |
|---|---|
| are what the text, tokenised as a whole, begins with | the text's |
| are what it begins with, but an answer was drawn in other tokens | theirs, then those of the rest of the text |
| are written otherwise by the template, or by the client | the text's |
| have more than `max_context` tokens, or leave no room | those of the text without them: the topic is reset |

A turn that brings the client's own chunks is what the later ones are about. It doesn't count for `max_context`, and
stays when its topic is reset, unless it leaves no room by itself.

A conversation is found by its name, or by its history where a client names none. What a client sends is the truth:
turns that it sends otherwise than they are remembered are forgotten. A client that names its conversation and sends
a question alone goes on where the conversation is.
"""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from ai100.notes import NO_NOTES, Note, Notes
from ai100.topics import PastTurn, Topics
from kvarena.engines.base import GenerationRequest, Tokenizer, check_in_vocabulary, num_tokens_to_generate, token_ids_of

Message = Mapping[str, Any]

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class ParsedMessages:
    """A request's messages taken apart: `system`, then questions with their answers, then the new question."""

    system: tuple[Message, ...]
    past: tuple[tuple[Message, Message], ...]
    question: Message

    @classmethod
    def of(cls, messages: Sequence[Message]) -> ParsedMessages | None:
        """`None` for messages in another order. Raises `ValueError` for an empty question, and for too many turns."""
        num_system = next((at for at, said in enumerate(messages) if said["role"] not in _SYSTEM_ROLES), len(messages))
        turns = messages[num_system:]
        if not turns or [said["role"] for said in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            return None
        if not text_of(turns[-1]).strip():
            raise ValueError("the message is empty; it needs at least one word")
        past = tuple(zip(turns[:-1:2], turns[1::2], strict=True))
        if len(past) >= MAX_TURNS:
            raise ValueError(f"the chat has {len(past) + 1} turns; at most {MAX_TURNS} can be answered")
        return cls(tuple(messages[:num_system]), past, turns[-1])


@dataclass(eq=False)
class TopicTurn:
    """A question and, when it has ended, its answer. `starts_anew`: what its topic said before is no part of it, but
    for the last turn with chunks where it `keeps_context`.

    `token_ids` are those of the topic up to the answer's end and `text` what they say; a topic's last turns have them,
    and none that came from a client.
    """

    topic: str
    question: Message
    answer: Message | None = None
    starts_anew: bool = False
    keeps_context: bool = False
    token_ids: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Prompt:
    """`num_earlier_turns` counts the topic's turns before this one, `reset_reason` says why they aren't in it,
    `keeps_context` whether the one with chunks is in it all the same. `notes` are all that were chosen.
    """

    token_ids: tuple[int, ...]
    text: str
    max_tokens: int
    num_earlier_turns: int = 0
    reset_reason: str | None = None
    keeps_context: bool = False
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Chat:
    """What a turn's prompt is made of. `earlier` are the conversation's turns before it, of whatever topic; `notes` are
    those to choose from.
    """

    system: tuple[Message, ...]
    earlier: tuple[TopicTurn, ...]
    turn: TopicTurn
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool = False
    notes: Notes = NO_NOTES

    def of_this_topic(self) -> list[TopicTurn]:
        """Those that were answered."""
        return [turn for turn in self.earlier if turn.topic == self.turn.topic and turn.answer is not None]


@dataclass(frozen=True)
class Rendered:
    """`num_notes_tokens` are those of the notes before the earlier turns' questions."""

    token_ids: tuple[int, ...]
    text: str
    notes: tuple[Note, ...]
    num_notes_tokens: int


@dataclass(frozen=True)
class PromptWriter:
    """`max_context`: with more tokens of earlier turns, system message, notes and chunks aside, a topic is reset.
    `gen_len`: the longest answer where the client doesn't say. `is_context`: whether a message brings chunks.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    max_context: int
    gen_len: int
    is_context: Callable[[str], bool] = lambda message: False

    def __post_init__(self) -> None:
        for name in ("max_context", "gen_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def of_chat(self, chat: Chat, wanted: int | None) -> Prompt:
        """`wanted` tokens of answer. Raises `ValueError` when even the question alone has no room."""
        before = chat.of_this_topic()
        turns = self._since_reset(before)
        whole, context, reason = self._render(chat, turns), self._context(turns), None
        if turns:
            rest = self._render(chat, context)
            num_earlier_tokens = len(whole.token_ids) - whole.num_notes_tokens
            num_earlier_tokens -= len(rest.token_ids) - rest.num_notes_tokens
            if reason := self._reset_reason(len(whole.token_ids), num_earlier_tokens, wanted):
                if not self._has_room(len(rest.token_ids), wanted):
                    context = []
                whole = self._render(chat, context)
        if whole.notes and not self._has_room(len(whole.token_ids), wanted):
            whole = self._render(replace(chat, notes=NO_NOTES), [])
        num_tokens = self._num_tokens(len(whole.token_ids), wanted)
        return Prompt(whole.token_ids, whole.text, num_tokens, len(before), reason, bool(context), whole.notes)

    def of_text(self, request: GenerationRequest) -> Prompt:
        """A prompt that is no chat: it is taken as it came."""
        token_ids = token_ids_of(request, self)
        text = request.prompt if isinstance(request.prompt, str) else ""
        return Prompt(tuple(token_ids), text, self._num_tokens(len(token_ids), request.sampling.max_tokens))

    def _render(self, chat: Chat, turns: Sequence[TopicTurn]) -> Rendered:
        of_topic, of_turns = _notes(chat, turns)
        said = [_with_notes(chat, turn.question, new) for turn, new in zip((*turns, chat.turn), of_turns, strict=True)]
        answers = [turn.answer for turn in turns]
        talk = [message for pair in zip(said, answers, strict=False) for message in pair]
        messages = [*_system(chat, of_topic), *talk, said[-1]]
        arguments = {"add_generation_prompt": True, **chat.template_arguments}
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
        except Exception as error:  # A template is a program of the model's author.
            raise ValueError(f"the model's chat template can't render these messages: {error}") from error
        token_ids = self.tokenizer.encode(text, add_special_tokens=chat.add_special_tokens)
        known = turns[-1].token_ids if turns else ()
        if tuple(token_ids[: len(known)]) != known and text.startswith(turns[-1].text):
            token_ids = [*known, *self.tokenizer.encode(text[len(turns[-1].text) :], add_special_tokens=False)]
        check_in_vocabulary(token_ids, self.vocab_size)
        num_notes_tokens = sum(note.num_tokens for new in of_turns[:-1] for note in new)
        return Rendered(tuple(token_ids), text, (*of_topic, *chain(*of_turns)), num_notes_tokens)

    def _context(self, turns: Sequence[TopicTurn]) -> list[TopicTurn]:
        """The last turn that brought chunks, if one did."""
        return [turn for turn in turns if self.is_context(text_of(turn.question))][-1:]

    def _since_reset(self, turns: Sequence[TopicTurn]) -> list[TopicTurn]:
        start = max((at for at, turn in enumerate(turns) if turn.starts_anew), default=0)
        kept = self._context(turns[:start]) if turns and turns[start].keeps_context else []
        return [*kept, *turns[start:]]

    def _has_room(self, num_tokens: int, wanted: int | None) -> bool:
        return num_tokens + (self.gen_len if wanted is None else wanted) <= self.max_model_len

    def _reset_reason(self, num_tokens: int, num_earlier_tokens: int, wanted: int | None) -> str | None:
        if num_earlier_tokens > self.max_context:
            return f"its earlier turns had {num_earlier_tokens} tokens, more than max_context {self.max_context}"
        if not self._has_room(num_tokens, wanted):
            needed = self.gen_len if wanted is None else wanted
            return f"{num_tokens} tokens and an answer of {needed} pass the context of {self.max_model_len}"
        return None

    def _num_tokens(self, num_prompt_tokens: int, wanted: int | None) -> int:
        room = num_tokens_to_generate(num_prompt_tokens, wanted, self)
        return min(room, self.gen_len) if wanted is None else room


def text_of(message: Message) -> str:
    return str(message.get("content") or "")


def _notes(chat: Chat, turns: Sequence[TopicTurn]) -> tuple[tuple[Note, ...], list[tuple[Note, ...]]]:
    """Those of the topic, and of each of these turns and the new one."""
    first, *messages = [
        chat.notes.question_in(text_of(turn.question)) for turn in (*chat.of_this_topic()[:1], *turns, chat.turn)
    ]
    of_topic = chat.notes.of_topic(first)
    return of_topic, list(chat.notes.of_turns(of_topic, first, messages or [first]))


def _system(chat: Chat, notes: Sequence[Note]) -> list[Message]:
    """The client's, else the folder's; the notes at its end."""
    joined = chat.notes.joined(notes)
    if chat.system:
        *before, last = chat.system
        return [*before, {**last, "content": text_of(last) + joined}] if joined else list(chat.system)
    content = chat.notes.system + joined
    return [{"role": "system", "content": content}] if content else []


def _with_notes(chat: Chat, question: Message, notes: Sequence[Note]) -> Message:
    return {**question, "content": chat.notes.joined(notes) + text_of(question)} if notes else question


MAX_CONVERSATIONS = 1024
MAX_TURNS = 4096
"""Of a conversation; more can't be sent, and of one that goes on without its history the oldest are forgotten."""
MAX_TOPIC_TURNS = 64
MAX_TOKENISED = 8
"""How many of a topic's turns keep their tokens: a client may go back and ask otherwise."""
MAX_HISTORIES = 256
"""By so many histories a conversation is found again, those used last: one for each turn, and one for each branch."""


@dataclass(eq=False)
class Conversation:
    """`id` is ours: two clients that choose one name under two salts have two conversations."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    system: tuple[Message, ...] = ()
    turns: list[TopicTurn] = field(default_factory=list)
    name: tuple[str, str] | None = None
    histories: dict[str, None] = field(default_factory=dict)
    """Least recently used first."""


@dataclass(frozen=True)
class OpenTurn:
    """A turn that was begun, and what came before it."""

    conversation: Conversation
    system: tuple[Message, ...]
    earlier: tuple[TopicTurn, ...]
    turn: TopicTurn


class ConversationMemory:
    """Thread-safe. Keeps the last `max_conversations`. `question_in` a message is what decides its topic."""

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

    def begin(
        self, exchange: ParsedMessages, salt: str, name: str | None, *, keep: bool = True, topic: str | None = None
    ) -> OpenTurn:
        """The next turn of the conversation that this belongs to. Without `keep` it is a turn on the side that isn't
        remembered. Without a `topic` the message's words decide it.
        """
        with self._lock:
            conversation = self._find(exchange, salt, name) if keep else Conversation()
            history = _history_before(exchange, salt)
            if exchange.past and history in conversation.histories:  # it is the last used one now
                conversation.histories[history] = conversation.histories.pop(history)
            remembered = list(conversation.turns)
        # Finding topics takes its time, and whoever answers a turn needs the lock.
        turns = self._turns_before(exchange, name, remembered)
        turn = TopicTurn(topic or self._topic_of(exchange.question, turns), exchange.question)
        with self._lock:
            if keep and conversation.name is not None:  # another request may have begun or evicted it meanwhile
                conversation = self._named.get(conversation.name, conversation)
            if not _goes_on_alone(exchange, name):
                conversation.turns = turns
            if exchange.system or not _goes_on_alone(exchange, name):
                conversation.system = exchange.system
            earlier = tuple(conversation.turns)
            conversation.turns.append(turn)
            del conversation.turns[:-MAX_TURNS]
            if keep:
                self._keep(conversation, salt)
            return OpenTurn(conversation, conversation.system, earlier, turn)

    def preview(self, exchange: ParsedMessages, salt: str, name: str | None) -> tuple[str, bool]:
        """The topic that `begin` would find for this turn, and whether it is new to the conversation. Changes nothing.
        Of turns that aren't remembered the last `MAX_TOPIC_TURNS` count.
        """
        with self._lock:
            remembered = list(self._find(exchange, salt, name).turns)
        turns = self._turns_before(exchange, name, remembered, MAX_TOPIC_TURNS)
        topic = self._topic_of(exchange.question, turns)
        return topic, not any(turn.topic == topic and turn.answer is not None for turn in turns)

    def named(self, salt: str, name: str) -> str:
        """The id of a conversation, which need not have turns."""
        with self._lock:
            conversation = self._by_name(salt, name)
            self._keep(conversation, salt)
            return conversation.id

    def remember(self, begun: OpenTurn, prompt: Prompt, answer: str, answer_ids: Sequence[int]) -> None:
        """The turn has ended with this answer."""
        turn = begun.turn
        with self._lock:
            for earlier in [earlier for earlier in begun.earlier if earlier.topic == turn.topic][:-MAX_TOKENISED]:
                earlier.token_ids, earlier.text = (), ""
            turn.starts_anew, turn.keeps_context = prompt.reset_reason is not None, prompt.keeps_context
            turn.token_ids, turn.text = (*prompt.token_ids, *answer_ids), prompt.text + answer
            turn.answer = {"role": "assistant", "content": answer}

    def drop(self, begun: OpenTurn) -> None:
        """The turn has ended without an answer: it never was."""
        with self._lock:
            turns = begun.conversation.turns
            if begun.turn in turns:
                turns.remove(begun.turn)

    def _topic_of(self, question: Message, earlier: Sequence[TopicTurn]) -> str:
        """By the last `MAX_TOPIC_TURNS` of the turns before it."""
        said = [
            PastTurn(turn.topic, self._question_in(text_of(turn.question)), text_of(turn.answer) if turn.answer else "")
            for turn in earlier[-MAX_TOPIC_TURNS:]
        ]
        return self._topics.topic_of(self._question_in(text_of(question)), said)

    def _turns_before(
        self, exchange: ParsedMessages, name: str | None, remembered: list[TopicTurn], most_new: int = MAX_TURNS
    ) -> list[TopicTurn]:
        """What the conversation has said before this turn. The turns that a client sends are taken as remembered up to
        the first that differs, then the last `most_new` anew.
        """
        if _goes_on_alone(exchange, name):
            return remembered
        past, turns = exchange.past, list[TopicTurn]()
        for (question, answer), turn in zip(past, remembered, strict=False):
            if not _is_same(turn, question, answer):
                break
            turns.append(turn if turn.answer == answer else replace(turn, question=question, answer=answer))
        for question, answer in past[len(turns) :][-most_new:]:
            turns.append(TopicTurn(self._topic_of(question, turns), question, answer))
        return turns

    def _find(self, exchange: ParsedMessages, salt: str, name: str | None) -> Conversation:
        """Changes nothing; a conversation that isn't known is a new one."""
        if name is not None:
            return self._by_name(salt, name)
        history = _history_before(exchange, salt)
        candidates = self._by_history.get(history, ()) if exchange.past else ()
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
                conversation.histories[history] = None
                self._by_history.setdefault(history, []).append(conversation)
                if len(conversation.histories) > MAX_HISTORIES:
                    self._forget_history(conversation, next(iter(conversation.histories)))
        while len(self._conversations) > self._max_conversations:
            _, oldest = self._conversations.popitem(last=False)
            if oldest.name is not None:
                del self._named[oldest.name]
            for history in list(oldest.histories):
                self._forget_history(oldest, history)

    def _forget_history(self, conversation: Conversation, history: str) -> None:
        del conversation.histories[history]
        self._by_history[history].remove(conversation)
        if not self._by_history[history]:
            del self._by_history[history]


def _goes_on_alone(exchange: ParsedMessages, name: str | None) -> bool:
    return name is not None and not exchange.past


def _is_same(turn: TopicTurn, question: Message, answer: Message) -> bool:
    """A client may have cut an answer, at a stop string or when its reader had enough."""
    if turn.answer is None or text_of(turn.question) != text_of(question):
        return False
    return text_of(turn.answer).startswith(text_of(answer))


def _history_before(exchange: ParsedMessages, salt: str) -> str:
    return _history(salt, exchange.system, [question for question, _ in exchange.past])


def _history(salt: str, system: Sequence[Message], questions: Sequence[Message]) -> str:
    said = [salt, [text_of(message) for message in system], [text_of(message) for message in questions]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
