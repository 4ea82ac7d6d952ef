"""The AI 100 engine and its request parameters: `AI100Generation._steps` is a turn from its message to its last token.

Everything above `Runtime` is the same code on a card and on a host.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, StrictBool, StringConstraints

from ai100.batcher import BatchedRequest, Batcher
from ai100.conversation import (
    Chat,
    ConversationMemory,
    Message,
    OpenTurn,
    ParsedMessages,
    Prompt,
    PromptWriter,
    text_of,
)
from ai100.notes import NO_NOTES, Notes
from ai100.runtimes.runtime import Runtime
from ai100.slots import SlotKey
from ai100.topics import Topics
from kvarena.engines.base import FinishReason, GeneratedToken, GenerationRequest, Report, spans_of
from kvarena.engines.sampling import Sampler
from kvarena.engines.store_metrics import StoreFigures
from kvarena.server.text import Detokenizer


class AI100Options(BaseModel):
    """`use_cache` false processes the topic's whole history anew, and keeps nothing of it.

    `notes`: whether the server adds notes that fit the topic; left out, it does so for a client that sends neither a
    system message nor chunks of its own. `topic`: the message's; left out, the server finds it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    use_cache: StrictBool = True
    notes: StrictBool | None = None
    topic: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80)] | None = None


class SlotRow(BaseModel):
    """`position` tokens have their KV in the slot; the larger `last_used`, the later. `is_aside`: no topic gets it, for
    it is kept for turns without slots.
    """

    slot: int
    topic: str | None
    conversation: str | None
    position: int
    has_pending_token: bool
    in_use: bool
    last_used: int
    is_aside: bool


GEN_LEN = 500
PLAIN_TEXT = "text"
"""The topic of prompts that are no chat."""


class AI100Engine:
    """Implements `kvarena.engines.base.Engine`. Owns the runtime. `max_context` `None`: what a slot holds.

    `sets_aside`: a slot is kept for turns without the cache, so that they push out no topic.
    """

    contender = "ai100"
    options_model: type[BaseModel] | None = AI100Options

    def __init__(
        self,
        runtime: Runtime,
        model_name: str,
        topics: Topics,
        *,
        max_context: int | None = None,
        gen_len: int = GEN_LEN,
        use_cache: bool = True,
        notes: Notes = NO_NOTES,
        sets_aside: bool = True,
    ) -> None:
        self.model_name = model_name
        self.max_model_len = runtime.shapes.ctx_len
        self.tokenizer = runtime.tokenizer
        self.use_cache = use_cache
        self.runtime = runtime
        self.writer = PromptWriter(
            runtime.tokenizer,
            runtime.vocab_size,
            self.max_model_len,
            self.max_model_len if max_context is None else max_context,
            gen_len,
            notes.is_context,
        )
        self.notes = notes
        self.memory = ConversationMemory(topics, question_in=notes.question_in)
        self.batcher = Batcher(runtime, sets_aside=sets_aside)
        self._topics = type(topics).__name__

    def generate(self, request: GenerationRequest) -> AI100Generation:
        return AI100Generation(self, request)

    def topic_of(self, messages: Sequence[Message], salt: str, conversation: str | None) -> tuple[str, bool]:
        """Which topic a chat's last message would go to, and whether it is new there. Nothing is answered, remembered,
        or moved in the slots. Raises `ValueError` as a generation does.
        """
        exchange = ParsedMessages.of(messages)
        return (PLAIN_TEXT, True) if exchange is None else self.memory.preview(exchange, salt, conversation)

    def describe(self) -> dict[str, Any]:
        return {
            "contender": self.contender,
            "defaults": {"use_cache": self.use_cache},
            "runtime": self.runtime.name,
            "topics": self._topics,
            "max_context": self.writer.max_context,
            "gen_len": self.writer.gen_len,
            "num_notes": len({note.name for note in self.notes.notes}),
            "notes_tokens": self.notes.budget,
            **asdict(self.runtime.shapes),
        }

    def store_figures(self) -> StoreFigures:
        """Of the slots. Their memory is taken whole when the device is opened."""
        slots = self.batcher.slots
        num_topics = sum(slot.key is not None for slot in slots.rows())
        return StoreFigures(slots.num_hits, slots.num_misses, slots.num_evictions, num_topics)

    def slot_rows(self) -> list[SlotRow]:
        """What lies in the slots now."""
        return [
            SlotRow(
                slot=slot.index,
                topic=slot.key.topic if slot.key else None,
                conversation=slot.key.conversation if slot.key else None,
                position=slot.position,
                has_pending_token=slot.pending is not None,
                in_use=slot.in_use,
                last_used=slot.last_used,
                is_aside=slot.is_aside,
            )
            for slot in self.batcher.slots.rows()
        ]

    def close(self) -> None:
        self.batcher.close()


class AI100Generation:
    """One request. Implements `kvarena.engines.base.Generation`."""

    def __init__(self, engine: AI100Engine, request: GenerationRequest) -> None:
        self.report = Report()
        self.finish_reason: FinishReason | None = None
        self.prompt_token_ids: Sequence[int] = ()
        self._engine = engine
        self._request = request
        options = request.options if isinstance(request.options, AI100Options) else AI100Options()
        self._use_cache = options.use_cache and engine.use_cache
        self._wants_notes = options.notes
        self._topic = options.topic
        self._begun: OpenTurn | None = None  # stays `None` for a prompt that is no chat
        self._turn: BatchedRequest | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __iter__(self) -> Iterator[GeneratedToken]:
        yield from self._steps()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            turn = self._turn
        if turn is not None:
            self._engine.batcher.let_go(turn)

    def _steps(self) -> Iterator[GeneratedToken]:
        # 1. Which conversation and topic is it?
        key = self._begin()
        self.report.texts["topic"] = key.topic

        # 2. Queue it. The batcher has the prompt made when the topic's earlier turns have ended.
        turn = self._batched(key)
        with self._lock:
            self._turn = turn
            turn.closed = self._closed
        self._engine.batcher.submit(turn)

        # 3. Stream.
        try:
            yield from turn
            self.finish_reason = turn.finish_reason
        finally:
            # 4. What was read is what was said, also where the reader stopped before the end.
            self.close()
            turn.ended.wait()
            if turn.num_taken < len(turn.answer_ids):
                self._remember(turn)
            self._fill_report(turn)

    def _begin(self) -> SlotKey:
        """Whose slot the request needs."""
        request, memory = self._request, self._engine.memory
        name, salt = request.conversation_id, request.cache_salt
        exchange = ParsedMessages.of(request.messages) if request.messages else None
        if exchange is None:
            named = memory.named(salt, name) if name is not None and request.sample == 0 else uuid.uuid4().hex
            return SlotKey(salt, named, PLAIN_TEXT)
        if request.num_samples > 1 and name is not None and not exchange.past:
            raise ValueError(f"n is {request.num_samples}; a conversation that goes on by its name takes one answer")
        begun = self._begun = memory.begin(exchange, salt, name, keep=request.sample == 0, topic=self._topic)
        return SlotKey(salt, begun.conversation.id, begun.turn.topic)

    def _batched(self, key: SlotKey) -> BatchedRequest:
        sampling = self._request.sampling
        sampler = Sampler(sampling, torch.device("cpu"))
        return BatchedRequest(
            key=key,
            prepare=self._prompt,
            draw=lambda logits: sampler.draw(torch.from_numpy(logits)),
            on_end=self._remember,
            eos_token_ids=frozenset() if sampling.ignore_eos else self._engine.runtime.eos_token_ids,
            use_cache=self._use_cache,
            keeps_slot=self._is_found_again,
        )

    @property
    def _is_found_again(self) -> bool:
        """Of a question's samples the first is remembered; text has no history, so only a name leads back to it."""
        request = self._request
        return request.sample == 0 and (self._begun is not None or request.conversation_id is not None)

    def _prompt(self) -> Prompt:
        """In the batcher's thread for prompts."""
        request, begun, writer = self._request, self._begun, self._engine.writer
        if begun is None:
            prompt = writer.of_text(request)
        else:
            chat = Chat(
                begun.system,
                begun.earlier,
                begun.turn,
                request.template_arguments,
                request.add_special_tokens,
                self._notes(begun),
            )
            prompt = writer.of_chat(chat, request.sampling.max_tokens)
        self.prompt_token_ids = prompt.token_ids
        return prompt

    def _notes(self, begun: OpenTurn) -> Notes:
        """Those to choose from; none where the client brings a context of its own."""
        notes, wanted = self._engine.notes, self._wants_notes
        if wanted is None:
            asked = (text_of(turn.question) for turn in (*begun.earlier, begun.turn))
            wanted = not begun.system and not any(map(notes.is_context, asked))
        return notes if wanted else NO_NOTES

    def _remember(self, turn: BatchedRequest) -> None:
        """The answer, as far as it was read where it was given up; a turn of which nothing was read never was."""
        if (begun := self._begun) is None:
            return
        given_up = turn.finish_reason is None or (self._closed and turn.num_taken < len(turn.answer_ids))
        said = turn.answer_ids[: turn.num_taken] if given_up else turn.answer_ids
        if turn.prompt is None or turn.error is not None or (given_up and not said):
            self._engine.memory.drop(begun)
            return
        text = Detokenizer(self._engine.tokenizer, turn.prompt.token_ids)
        self._engine.memory.remember(begun, turn.prompt, "".join(map(text.push, said)), said)

    def _fill_report(self, turn: BatchedRequest) -> None:
        figures, prompt, report = turn.figures, turn.prompt, self.report
        report.num_prompt_tokens = figures.num_prompt_tokens
        report.num_reused_tokens = figures.num_reused_tokens
        report.num_computed_tokens = figures.num_prompt_tokens - figures.num_reused_tokens
        report.details |= {
            "cache_enabled": self._use_cache,
            "slot": figures.slot,
            "turn": 1 + (prompt.num_earlier_turns if prompt else 0),
            "status": figures.status,
            "reason": figures.reason,
            "num_prefilled_tokens": report.num_computed_tokens,
            "num_decoded_tokens": figures.num_decoded_tokens,
            "timings": {
                name: round(getattr(figures, name), 3) for name in ("queue_ms", "prefill_ms", "decode_ms", "total_ms")
            },
            "spans": spans_of([(0, figures.num_reused_tokens, "reused")], figures.num_prompt_tokens),
        }
        report.texts["notes"] = ", ".join(dict.fromkeys(note.name for note in prompt.notes)) if prompt else ""
