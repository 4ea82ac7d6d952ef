"""One turn between two threads: the batcher's, which runs it, and its reader's, which takes the tokens.

| field | written by |
|---|---|
| `slot`, `figures`, `num_prefilled`, `last_token_id`, `finish_reason` | the batcher |
| `num_taken`, `closed` | the reader |
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter

from ai100.conversation import Prompt
from ai100.runtimes.runtime import Logits
from ai100.slots import Slot, SlotKey, Status
from kvarena.api.engine import FinishReason, GeneratedToken


@dataclass
class Figures:
    """What a turn cost. Milliseconds add up: waiting, then prefill up to the first token, then decode."""

    slot: int | None = None
    status: Status | None = None
    reason: str | None = None
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_decoded_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0


@dataclass
class BatchedTurn:
    """`prepare` makes the prompt when the topic's earlier turns have ended; it raises `ValueError` for one that can't
    be served. `on_end` hears of the end before a later turn of the topic begins.
    """

    key: SlotKey
    prepare: Callable[[], Prompt]
    draw: Callable[[Logits], GeneratedToken]
    on_end: Callable[[BatchedTurn], None]
    eos_token_ids: frozenset[int] = frozenset()
    use_cache: bool = True

    prompt: Prompt | None = None
    slot: Slot | None = None
    figures: Figures = field(default_factory=Figures)
    answer_ids: list[int] = field(default_factory=list)
    num_taken: int = 0
    closed: bool = False
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    _tokens: SimpleQueue[GeneratedToken | None] = field(default_factory=SimpleQueue)
    _submitted_s: float = field(default_factory=perf_counter)
    _stage_s: float = field(default_factory=perf_counter)

    def __iter__(self) -> Iterator[GeneratedToken]:
        """The reader's: tokens until the end. Raises what ended the turn, if anything did."""
        while (token := self._tokens.get()) is not None:
            self.num_taken += 1
            yield token
        if self.error is not None:
            raise self.error

    # -- the batcher's -----------------------------------------------------------------------------------------------

    @property
    def is_prefilled(self) -> bool:
        assert self.prompt is not None, "a turn that runs has a prompt"
        assert self.slot is not None, "a turn that runs has a slot"
        return self.slot.position >= len(self.prompt.token_ids)

    def begin(self, prompt: Prompt, slot: Slot, num_reused_tokens: int) -> None:
        self.prompt, self.slot = prompt, slot
        figures = self.figures
        figures.slot, figures.num_reused_tokens = slot.index, num_reused_tokens
        figures.num_prompt_tokens = len(prompt.token_ids)
        figures.status, figures.reason = self._status(prompt, num_reused_tokens)
        figures.queue_ms = self._lap_ms()

    def take(self, token: GeneratedToken) -> None:
        if not self.answer_ids:
            self.figures.prefill_ms = self._lap_ms()
        self.answer_ids.append(token.token_id)
        self.figures.num_decoded_tokens = len(self.answer_ids)
        self._tokens.put(token)

    def end(self, finish_reason: FinishReason | None, error: BaseException | None) -> None:
        self.finish_reason, self.error = finish_reason, error
        self.figures.decode_ms = self._lap_ms() if self.answer_ids else 0.0
        self.figures.total_ms = (perf_counter() - self._submitted_s) * 1e3
        try:
            self.on_end(self)
        except Exception as failed:  # It is the turn's, and not the batcher's.
            self.error = error or failed
        self.ended.set()
        self._tokens.put(None)

    def _status(self, prompt: Prompt, num_reused_tokens: int) -> tuple[Status, str | None]:
        if not self.use_cache:
            return Status.FULL_PREFILL, None
        if prompt.reset_reason is not None:
            return Status.RESET_TOPIC, prompt.reset_reason
        if num_reused_tokens:
            return Status.INCREMENTAL_PREFILL, None
        if prompt.num_earlier_turns:
            return Status.RESET_TOPIC, "its slot had been given away or lost; its turns were prefilled again"
        return Status.NEW_TOPIC, None

    def _lap_ms(self) -> float:
        before, self._stage_s = self._stage_s, perf_counter()
        return (self._stage_s - before) * 1e3
