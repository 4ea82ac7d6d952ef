"""Continuous batching over slots: `Batcher._run` is the whole of it.

One thread runs the device. In every round waiting requests get slots, in the order of their arrival; the oldest that
is still in its prompt runs one more piece of it; and all that are past theirs decode one token together. So a long
prompt delays the others' tokens by no more than a piece. Prompts are rendered and tokenised in a thread beside it, one
after the other: a long chat takes seconds, and the device goes on meanwhile.

| what goes wrong | who is hurt |
|---|---|
| a prompt that can't be served, an error in one request | that request; its slot is forgotten |
| an error in a batch | those of its requests that fail alone, too |
| the device is lost | all that run; waiting ones start in empty slots of the device that is opened anew |

A request stands between two threads: the batcher's, which runs it, and its reader's, which takes the tokens.

| field | written by |
|---|---|
| `slot`, `figures`, `num_prefilled`, `last_token_id`, `finish_reason` | the batcher |
| `num_taken`, `closed` | the reader |
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from time import perf_counter

from ai100.conversation import Prompt
from ai100.runtimes.runtime import DecodeRow, DeviceLost, Logits, Runtime
from ai100.slots import Slot, SlotKey, SlotTable, Status
from kvarena.engines.base import EngineUnavailable, FinishReason, GeneratedToken

logger = logging.getLogger(__name__)


@dataclass
class RequestMetrics:
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
class BatchedRequest:
    """`prepare` makes the prompt when the topic's earlier turns have ended; it raises `ValueError` for one that can't
    be served. `on_end` hears of the end before a later turn of the topic begins. Without `keeps_slot` no later turn can
    find its topic again. `num_taken` counts those of `answer_ids` that were read.
    """

    key: SlotKey
    prepare: Callable[[], Prompt]
    draw: Callable[[Logits], GeneratedToken]
    on_end: Callable[[BatchedRequest], None]
    eos_token_ids: frozenset[int] = frozenset()
    use_cache: bool = True
    keeps_slot: bool = True

    preparing: Future[Prompt] | None = None
    prompt: Prompt | None = None
    slot: Slot | None = None
    figures: RequestMetrics = field(default_factory=RequestMetrics)
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
            self.num_taken += not token.is_end
            yield token
        if self.error is not None:
            raise self.error

    # -- the batcher's -----------------------------------------------------------------------------------------------

    @property
    def slot_key(self) -> SlotKey | None:
        """`None`: what it leaves in its slot is of no use to anybody."""
        return self.key if self.use_cache and self.keeps_slot else None

    @property
    def is_being_prepared(self) -> bool:
        return self.preparing is not None and not self.preparing.done()

    @property
    def has_thread(self) -> bool:
        """One that is being prepared may still wait for the thread."""
        return self.preparing is not None and self.preparing.running()

    def give_up_prompt(self) -> bool:
        """One that waits to be prepared never is. Whether nobody is at it now."""
        return self.preparing is None or self.preparing.cancel() or self.preparing.done()

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
        """An end-of-sequence token is counted and read, and is no part of the answer."""
        if not self.figures.num_decoded_tokens:
            self.figures.prefill_ms = self._lap_ms()
        self.figures.num_decoded_tokens += 1
        if not token.is_end:
            self.answer_ids.append(token.token_id)
        self._tokens.put(token)

    def end(self, finish_reason: FinishReason | None, error: BaseException | None) -> None:
        self.finish_reason, self.error = finish_reason, error
        self.figures.decode_ms = self._lap_ms() if self.figures.num_decoded_tokens else 0.0
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


class Batcher:
    """Owns the runtime and closes it. `slots` are for its thread to change, and for others to look at; `sets_aside` is
    theirs.
    """

    def __init__(self, runtime: Runtime, *, sets_aside: bool = True) -> None:
        self.runtime = runtime
        shapes = runtime.shapes
        self.slots = SlotTable(shapes.kv_cache_batch_size, shapes.ctx_len, sets_aside=sets_aside)
        self._arrived: list[BatchedRequest] = []
        self._waiting: list[BatchedRequest] = []
        self._running: list[BatchedRequest] = []
        self._is_lost = False
        self._closing = False
        self._wake = threading.Condition()
        self._preparer = ThreadPoolExecutor(1, "ai100-prompts")
        self._thread = threading.Thread(target=self._run, name="ai100-batcher", daemon=True)
        self._thread.start()

    def submit(self, turn: BatchedRequest) -> None:
        """Its tokens come when it is iterated."""
        with self._wake:
            self._arrived.append(turn)
            is_late = self._closing
            self._wake.notify()
        if is_late:
            self.close()

    def let_go(self, turn: BatchedRequest) -> None:
        """Its reader has gone: it ends as soon as the step that runs has ended."""
        with self._wake:
            turn.closed = True
            self._wake.notify()

    def close(self) -> None:
        """Ends every turn and gives the device back. More than once is no error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._preparer.shutdown(cancel_futures=True)
        for turn in [*self._arrived, *self._waiting, *self._running]:
            turn.end(None, None)
        self._arrived, self._waiting, self._running = [], [], []
        self.runtime.close()

    # -- in the batcher's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._drop_closed()
                self._admit()
                self._prefill_a_piece()
                self._decode_a_token([turn for turn in self._running if turn.is_prefilled])
            except DeviceLost as error:
                logger.error("the device was lost with %d turns running: %s", len(self._running), error)
                self._is_lost = True
                self._end_running(EngineUnavailable(f"the device was lost in the middle of the answer: {error}"))
            except Exception:
                logger.exception("a bug in the batcher, with %d turns running", len(self._running))
                self._end_running(EngineUnavailable("the answer was lost by an error of the server"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._arrived or self._running or self._closing or self._may_admit())
            self._waiting += self._arrived
            self._arrived = []
            return not self._closing

    def _may_admit(self) -> bool:
        """Whether one of those that wait has more to wait for than prompts that are being prepared, or can go."""
        preparing = {turn.key for turn in self._waiting if turn.is_being_prepared}
        return any(turn.key not in preparing or (turn.closed and not turn.has_thread) for turn in self._waiting)

    def _drop_closed(self) -> None:
        """A prompt that is being prepared reads the conversation, which isn't changed meanwhile."""
        for turn in [turn for turn in self._running if turn.closed]:
            self._end(turn)
        for turn in [turn for turn in self._waiting if turn.closed and turn.give_up_prompt()]:
            self._waiting.remove(turn)
            turn.end(None, None)

    def _admit(self) -> None:
        """A turn whose topic is busy waits; those after it need not."""
        if self._waiting and self._is_lost and not self._reopened():
            return
        busy = {turn.key for turn in self._running}
        num_free_rows = self.runtime.shapes.full_batch_size - len(self._running)
        for turn in list(self._waiting):
            if not num_free_rows:
                return
            if turn.key in busy:
                continue
            busy.add(turn.key)
            if not self.slots.has_room(turn.slot_key, evicts=turn.use_cache):
                continue
            num_free_rows -= 1
            if turn.preparing is None:
                self._prepare(turn)
            elif turn.preparing.done():
                self._waiting.remove(turn)
                self._start(turn, turn.preparing)

    def _prepare(self, turn: BatchedRequest) -> None:
        try:
            turn.preparing = self._preparer.submit(turn.prepare)
        except RuntimeError as error:  # no thread can be started
            self._waiting.remove(turn)
            turn.end(None, EngineUnavailable(f"the prompt can't be prepared: {error}"))
        else:
            turn.preparing.add_done_callback(self._prepared)

    def _prepared(self, _: Future[Prompt]) -> None:
        with self._wake:
            self._wake.notify()

    def _start(self, turn: BatchedRequest, prepared: Future[Prompt]) -> None:
        if (failure := prepared.exception()) is not None:
            turn.end(None, failure)
            return
        prompt = prepared.result()
        taken = self.slots.take(turn.slot_key, evicts=turn.use_cache)
        assert taken is not None, "there is room"
        self._running.append(turn)
        turn.begin(prompt, taken.slot, self.slots.reuse(taken.slot, prompt.token_ids))
        if taken.is_new:
            try:
                self.runtime.clear(taken.slot.index)
            except DeviceLost:
                raise
            except Exception as error:
                self._fail(turn, error)

    def _prefill_a_piece(self) -> None:
        turn = next((turn for turn in self._running if not turn.is_prefilled), None)
        if turn is None:
            return
        slot, prompt = _held(turn), turn.prompt
        assert prompt is not None, "a turn that runs has a prompt"
        piece = prompt.token_ids[slot.position :][: self.runtime.shapes.prefill_seq_len]
        try:
            logits = self.runtime.prefill(slot.index, piece, slot.position)
        except DeviceLost:
            raise
        except Exception as error:
            self._fail(turn, error)
            return
        self.slots.extend(slot, piece)
        if turn.is_prefilled:
            self._advance(turn, logits)

    def _decode_a_token(self, turns: Sequence[BatchedRequest]) -> None:
        """One token in each. Running a token once more at its position changes nothing, so what failed together is
        tried alone.
        """
        if not turns:
            return
        rows = [DecodeRow(_held(turn).index, turn.answer_ids[-1], _held(turn).position) for turn in turns]
        try:
            logits = self.runtime.decode(rows)
        except DeviceLost:
            raise
        except Exception as error:
            if len(turns) == 1:
                self._fail(turns[0], error)
                return
            for turn in turns:
                self._decode_a_token([turn])
            return
        for turn, row, next_logits in zip(turns, rows, logits, strict=True):
            self.slots.extend(_held(turn), [row.token_id])
            self._advance(turn, next_logits)

    def _advance(self, turn: BatchedRequest, logits: Logits) -> None:
        """The next token `(V,)` is drawn: it is pending now, and may be the last."""
        try:
            token = turn.draw(logits)
        except Exception as error:
            self._fail(turn, error)
            return
        self.slots.set_pending(_held(turn), token.token_id)
        if token.token_id in turn.eos_token_ids:
            turn.take(replace(token, is_end=True))
            self._end(turn, "stop")
            return
        turn.take(token)
        assert turn.prompt is not None, "a turn that runs has a prompt"
        if len(turn.answer_ids) == turn.prompt.max_tokens:
            self._end(turn, "length")

    def _end(self, turn: BatchedRequest, finish_reason: FinishReason | None = None) -> None:
        self._running.remove(turn)
        self.slots.give_back(_held(turn))
        turn.end(finish_reason, None)

    def _fail(self, turn: BatchedRequest, error: BaseException) -> None:
        self._running.remove(turn)
        self.slots.forget(_held(turn))
        turn.end(None, error)

    def _end_running(self, error: EngineUnavailable) -> None:
        """What is in the slots can't be relied on any more."""
        self.slots.forget_all()
        turns, self._running = self._running, []
        for turn in turns:
            turn.end(None, error)

    def _reopened(self) -> bool:
        """Turns that wait while the device can't be opened fail, so that nobody waits for ever."""
        try:
            self.runtime.reopen()
        except Exception as error:
            logger.error("the device can't be opened: %s", error)
            turns, self._waiting = self._waiting, []
            for turn in turns:
                turn.give_up_prompt()
                turn.end(None, EngineUnavailable(f"the device is lost: {error}"))
            return False
        logger.info("the device was opened again, with empty slots")
        self._is_lost = False
        return True


def _held(turn: BatchedRequest) -> Slot:
    assert turn.slot is not None, "a turn that runs has a slot"
    return turn.slot
