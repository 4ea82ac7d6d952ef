"""The table of KV slots as `GET /slots` gives it, what changed in it, a chat on slots, and the slots as HTML.

A chat answers each message with slots and without. Both modes get the same messages, in which a turn's answer is the
first mode's complete one, else the first with text. Without sampling both answers are equal, so it is the history of
either mode.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from chat import Chat, Context, Turn
from figures import Figures, Tone
from settings import Contender, read_fields


@dataclass(frozen=True)
class Slot:
    """`num_tokens` of the slot have KV; a pending token comes after them. An empty slot has no `topic`.

    A larger `last_used` is later; 0: never. `is_aside`: it is kept for turns without slots.
    """

    index: int
    topic: str | None
    conversation: str | None
    num_tokens: int
    has_pending_token: bool
    in_use: bool
    last_used: int
    is_aside: bool = False

    def told(self, own: Collection[str]) -> str | None:
        """The topic's name, if it is one of these conversations'."""
        return self.topic if self.topic is None or self.conversation in own else "a topic"

    @property
    def holds(self) -> tuple[str | None, str | None]:
        return self.conversation, self.topic


MAX_TOPIC_CHARS = 80
NUM_SHADES = 6


def topic_name(typed: str) -> str:
    """As the server takes it; empty for nothing but spaces."""
    return " ".join(typed.split())[:MAX_TOPIC_CHARS].strip()


@dataclass(frozen=True)
class NextTopic:
    """Where a message would go. `is_new`: the conversation has no answers in this topic yet."""

    name: str
    is_new: bool


@dataclass(frozen=True)
class SlotTable:
    slots: tuple[Slot, ...]
    ctx_len: int

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> SlotTable:
        slots = [{**row, "index": row["slot"], "num_tokens": row["position"]} for row in table["slots"]]
        return cls(tuple(read_fields(Slot, slot) for slot in slots), table["ctx_len"])

    def conversation_of(self, index: int) -> str | None:
        return next((slot.conversation for slot in self.slots if slot.index == index), None)

    def by_last_use(self) -> list[Slot]:
        """Those that hold something, latest first."""
        return sorted((s for s in self.slots if s.topic is not None), key=lambda slot: -slot.last_used)


@dataclass(frozen=True)
class SlotChange:
    """A slot that now holds another topic, or another conversation's; None: nothing. Topics of other chats aren't
    named.
    """

    index: int
    before: str | None
    after: str | None

    def text(self) -> str:
        if self.before is None:
            return f"filled slot {self.index}: {self.after}"
        if self.after is None:
            return f"emptied slot {self.index} of {self.before}"
        return f"replaced slot {self.index}: {self.before} → {self.after}"


def changes(before: SlotTable, after: SlotTable, own: Collection[str]) -> list[SlotChange]:
    """Slot by slot; none if the table's size changed, since that is another server. `own` are the conversations of the
    chat: other conversations' topics aren't named.
    """
    if len(before.slots) != len(after.slots):
        return []
    pairs = zip(before.slots, after.slots, strict=True)
    return [SlotChange(old.index, old.told(own), new.told(own)) for old, new in pairs if old.holds != new.holds]


@dataclass(frozen=True)
class Mode:
    name: str
    title: str
    use_cache: bool

    def of(self, server: Contender) -> Contender:
        return dataclasses.replace(server, name=self.name, title=self.title, service=server.name)


CACHED = Mode("cached", "With slots", use_cache=True)
UNCACHED = Mode("uncached", "Without", use_cache=False)
MODES = (CACHED, UNCACHED)


MIN_SAVING = 0.1
"""A smaller share of the time is noise between turns."""


@dataclass(frozen=True)
class Saved:
    """Over the turns that were answered in both modes: what the slots saved of `uncached_ms`, the sum of the times to
    first token without them, and how many tokens they didn't prefill.
    """

    num_turns: int = 0
    first_token_ms: float = 0.0
    uncached_ms: float = 0.0
    num_tokens: int = 0

    @property
    def tone(self) -> Tone:
        if abs(self.first_token_ms) < MIN_SAVING * self.uncached_ms:
            return "tie"
        return "gain" if self.first_token_ms > 0 else "loss"


@dataclass
class SlotChat(Chat):
    """`slot_history` says what the turns did to the slots, oldest first; `conversations` are the server's ids of this
    chat's, as far as they were seen.
    """

    slot_history: list[str] = field(default_factory=list)
    conversations: set[str] = field(default_factory=set)
    _seen: SlotTable | None = None
    _num_noted: int = 0

    def messages(self, contender: str, context: Context, question: str) -> list[dict[str, str]]:
        """The system prompt is every topic's. Answers are as they came."""
        messages = [{"role": "system", "content": context.system}] if context.system else []
        for turn in self.conversation(context):
            if said := _said(turn):
                messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": said}]
        return [*messages, {"role": "user", "content": question}]

    def missed(self, index: int) -> dict[str, int]:
        return dict.fromkeys(self.turns[index].answers, 0)

    def name(self, context: Context) -> str:
        """Of the conversation that a question over `context` belongs to; a new name if it has no answers yet."""
        answered = [turn for turn in self.conversation(context) if _said(turn)]
        first = next((at for at, turn in enumerate(self.turns) if answered and turn is answered[0]), len(self.turns))
        public = hashlib.sha256(self.key.encode()).hexdigest()[:32]  # servers log it, and the key itself opens the chat
        return f"{public}-{first}"

    def saved(self) -> Saved:
        pairs = [_figures_of_both(turn) for turn in self.turns]
        both = [pair for pair in pairs if pair]
        uncached_ms = sum(without.first_token_ms or 0 for _, without in both)
        return Saved(
            num_turns=len(both),
            first_token_ms=uncached_ms - sum(cached.first_token_ms or 0 for cached, _ in both),
            uncached_ms=uncached_ms,
            num_tokens=sum((w.num_computed_tokens or 0) - (c.num_computed_tokens or 0) for c, w in both),
        )

    def topics(self) -> list[str]:
        """This chat's, latest first."""
        turns = [a.figures.slot_turn for turn in reversed(self.turns) for a in turn.answers.values()]
        return list(dict.fromkeys(turn.topic for turn in turns if turn))

    def take_back(self) -> Turn:
        """The last turn, which is to be asked again: the next change in the slots is still this chat's doing."""
        turn = self.turns.pop()
        self._num_noted = min(self._num_noted, len(self.turns))
        return turn

    def note_slots(self, table: SlotTable) -> None:
        """Call between turns: notes who changed each slot that changed since the last call."""
        is_after_turn = len(self.turns) > self._num_noted
        own = self._slot_of_last_turn() if is_after_turn else None
        if own is not None and (conversation := table.conversation_of(own)):
            self.conversations.add(conversation)
        for change in changes(self._seen, table, self.conversations) if self._seen else ():
            is_own = is_after_turn and (own in (change.index, None) or change.after is None)
            who = f"turn {len(self.turns)}" if is_own else "another conversation"
            self.slot_history.append(f"{who} {change.text()}")
        self._seen, self._num_noted = table, len(self.turns)

    def _slot_of_last_turn(self) -> int | None:
        answer = self.turns[-1].answers.get(CACHED.name)
        done = answer.figures.slot_turn if answer else None
        return done.slot if done else None


def _said(turn: Turn) -> str:
    """Empty for a turn that nobody answered; the conversation leaves it out."""
    answers = sorted(turn.answers.values(), key=lambda answer: answer.state != "done")
    return next((answer.text for answer in answers if answer.text.strip()), "")


def _figures_of_both(turn: Turn) -> tuple[Figures, Figures] | None:
    answers = [turn.answers.get(mode.name) for mode in MODES]
    figures = [answer.figures for answer in answers if answer and answer.state == "done"]
    return (figures[0], figures[1]) if len(figures) == len(MODES) else None


# -- HTML --------------------------------------------------------------------------------------------------------------


def slots_html(table: SlotTable, own: Collection[str]) -> str:
    """`own` are the conversations of the chat on the page."""
    ranks = {slot.index: rank for rank, slot in enumerate(table.by_last_use())}
    topics = sorted({topic for slot in table.slots if (topic := slot.told(own)) is not None})
    cells = "".join(_slot_html(slot, table.ctx_len, ranks, topics, own) for slot in table.slots)
    return f'<div class="ka-slots" data-testid="slots">{cells}</div>'


def _slot_html(slot: Slot, ctx_len: int, ranks: dict[int, int], topics: list[str], own: Collection[str]) -> str:
    topic = slot.told(own)
    attributes = f'data-testid="slot-{slot.index}" data-topic="{escape(topic or "")}" data-tokens="{slot.num_tokens}"'
    if topic is None:
        free_for = "kept for answers without slots" if slot.is_aside else "free for the next topic"
        return (
            f'<div class="ka-slot" {attributes}><div class="ka-slot-head"><b>Slot {slot.index}</b>'
            f'<span>empty</span></div><div class="ka-bar"></div><small>{free_for}</small></div>'
        )
    whose = "this chat" if slot.conversation in own else "another conversation"
    pending = " and the pending one" if slot.has_pending_token else ""
    shade = topics.index(topic) % NUM_SHADES
    return (
        f'<div class="ka-slot ka-shade-{shade}" {attributes}><div class="ka-slot-head"><b>Slot {slot.index}</b>'
        f"<span>{escape(topic)}</span></div>"
        f'<div class="ka-bar" title="{slot.num_tokens:,} of {ctx_len:,} tokens">'
        f'<span class="ka-part ka-filled" style="width:{100 * slot.num_tokens / ctx_len:.2f}%"></span></div>'
        f"<small>{slot.num_tokens:,} of {ctx_len:,} tokens{pending}<br>{whose}, {_last_used(slot, ranks)}</small></div>"
    )


def _last_used(slot: Slot, ranks: dict[int, int]) -> str:
    if slot.in_use:
        return "in use now"
    rank = ranks[slot.index]
    if rank == 0:
        return "used last"
    return "used longest ago" if rank == len(ranks) - 1 else f"used {rank} topic{'s' if rank > 1 else ''} before"


def next_topic_html(topic: NextTopic | None, problem: str = "", is_chosen: bool = False) -> str:
    """The chip above the question box. None: nothing is typed yet, or the server doesn't say."""
    if topic is None:
        text = f"Its topic is known once it is asked. {problem}" if problem else "Its topic shows as you type"
        return f'<div class="ka-next" aria-live="polite" data-testid="next-topic" data-topic="">{escape(text)}</div>'
    begins = "Begins the topic" if topic.is_new else "Goes to"
    chosen = ", as you chose" if is_chosen else ""
    return (
        f'<div class="ka-next ka-next-{"new" if topic.is_new else "known"}" aria-live="polite" '
        f'data-testid="next-topic" data-topic="{escape(topic.name)}">{begins} <b>{escape(topic.name)}</b>{chosen}</div>'
    )
