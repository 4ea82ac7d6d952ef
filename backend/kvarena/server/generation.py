"""One generation on a thread of its own; its events arrive on the event loop, in order, through a callback.

| where | what happens |
|---|---|
| event loop | `start`, `close`; every event is emitted there, and `Ended` is the last one and comes once |
| thread | the engine: `generate`, each token, `close`; and the text of each token |

A token that is under way when a generation is closed ends first; nobody waits for it. Also here: the line that a
generation gets in the log, with what its prompt was made of, how it ended and how long it took.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from kvarena.engines.base import (
    TOKEN_COUNTS,
    Engine,
    EngineUnavailable,
    FinishReason,
    Generation,
    GenerationRequest,
    Report,
)
from kvarena.server.detokenizer import StopRule, TextDelta, TextStream
from kvarena.server.log import CLIENT_GONE, figures, log_request


@dataclass(frozen=True)
class Outcome:
    """How a generation went. `finish_reason` None without an error: it was closed before its end. Times in seconds of
    `time.perf_counter`; `first_token_at` None: there was none.
    """

    report: Report
    finish_reason: FinishReason | None
    num_tokens: int
    started_at: float
    ended_at: float
    first_token_at: float | None = None
    last_token_at: float | None = None
    error: BaseException | None = None

    @property
    def refused(self) -> bool:
        """Whether the engine won't serve this request, as its contract says it: before the first token."""
        return isinstance(self.error, ValueError) and self.first_token_at is None


@dataclass(frozen=True)
class Ended:
    outcome: Outcome


Event = TextDelta | Ended


@dataclass
class RunningGeneration:
    """`emit` gets every event on the event loop that called `start`."""

    engine: Engine
    request: GenerationRequest
    stop: StopRule
    emit: Callable[[Event], None]
    _closed: bool = False
    _generation: Generation | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _num_tokens: int = 0
    _first_token_at: float | None = None
    _last_token_at: float | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        name = f"generation-{self.request.request_id}"
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except RuntimeError as error:  # The machine gives no more threads.
            now = time.perf_counter()
            self.emit(Ended(Outcome(Report(), None, 0, now, now, error=error)))

    def close(self) -> None:
        """From any thread, more than once."""
        with self._lock:
            self._closed = True
            generation = self._generation
        if generation is not None:
            generation.close()

    def _run(self) -> None:
        started_at = time.perf_counter()
        report, reason, error = Report(), None, None
        try:
            generation = self.engine.generate(self.request)
            with contextlib.closing(generation):
                reason = self._iterate(generation)
            report = generation.report
        except BaseException as raised:
            # Whatever an engine raises is the request's end and nothing else's.
            error = raised
            report = self._generation.report if self._generation else report
        outcome = Outcome(
            report,
            reason,
            self._num_tokens,
            started_at,
            time.perf_counter(),
            self._first_token_at,
            self._last_token_at,
            error,
        )
        self._emit(Ended(outcome))

    def _iterate(self, generation: Generation) -> FinishReason | None:
        """Tokens until the engine, a stop string or the client ends them; says which of the first two it was."""
        with self._lock:
            self._generation = generation
            if self._closed:
                return None
        text: TextStream | None = None
        tokens = iter(generation)
        try:
            for token in tokens:
                self._count_token()
                if self._closed:
                    return None
                text = text or TextStream(self.engine.tokenizer, generation.prompt_token_ids, self.stop)
                self._emit(text.push(token))
                if text.stopped:
                    return "stop"
        finally:
            if isinstance(tokens, Generator):
                tokens.close()  # Its own cleaning up, in the thread that it ran in.
        if self._closed:
            return None
        assert generation.finish_reason is not None, "a generation's tokens ended without a finish_reason"
        if text is not None and (rest := text.flush()):
            self._emit(rest)
        return generation.finish_reason

    def _count_token(self) -> None:
        self._num_tokens += 1
        self._last_token_at = time.perf_counter()
        self._first_token_at = self._first_token_at or self._last_token_at

    def _emit(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: the server has ended.
            self._loop.call_soon_threadsafe(self.emit, event)


_STATUSES = {"stop": 200, "length": 200, "abort": CLIENT_GONE, "refused": 400, "error": 500}


def log_outcome(contender: str, request: GenerationRequest, outcome: Outcome, arrived_at: float) -> None:
    """A request of several choices has a line for each."""
    report = outcome.report
    fields: dict[str, object] = {
        "id": request.request_id,
        "finish": finish_of(outcome),
        "approximate": report.approximate,
        "num_prompt_tokens": report.num_prompt_tokens,
        **{name: getattr(report, name) for name in TOKEN_COUNTS},
        "num_generated_tokens": outcome.num_tokens,
    }
    if outcome.first_token_at is not None:
        fields["ttft_ms"] = (outcome.first_token_at - arrived_at) * 1e3
    fields["total_ms"] = (outcome.ended_at - arrived_at) * 1e3
    fields["details"] = figures(report.details)
    log_request(contender, request.http_request_id, status_of(outcome), fields)


def finish_of(outcome: Outcome) -> str:
    """`stop`, `length`, `abort` (its client went away), `refused` or `error`."""
    if outcome.error is not None:
        return "refused" if outcome.refused else "error"
    return outcome.finish_reason or "abort"


def status_of(outcome: Outcome) -> int:
    """What the client was told, or would have been told if its stream hadn't begun."""
    return 503 if isinstance(outcome.error, EngineUnavailable) else _STATUSES[finish_of(outcome)]
