"""`kvarena bench ai100`: what KV slots gain in multi-turn chat.

Time to first token: conversations with a long first message; every turn is asked with and without the cache,
alternating. Throughput: conversations in progress; a turn of all of them at once, and one turn after the other,
alternating.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median_high
from time import perf_counter

from rich.console import Console

from ai100.engine import AI100Engine, AI100Options
from ai100.settings import EngineSettings, open_engine
from kvarena.bench.console import table_of
from kvarena.bench.measure import TimedTokens, timed
from kvarena.bench.prefix import make_text
from kvarena.bench.results import Row, ratio_spread, spread
from kvarena.bench.shapes import model_folder
from kvarena.contenders.ai100 import AI100Settings

AT_ONCE, IN_TURN = "at once", "one after the other"


@dataclass(frozen=True)
class AI100Workload:
    """`num_conversations` run at once for the throughput; `num_repeats` conversations for the time to first token."""

    history_tokens: int = 1000
    num_turns: int = 10
    num_repeats: int = 2
    num_conversations: int = 4
    question_tokens: int = 20
    max_new_tokens: int = 16
    throughput_tokens: int = 48
    num_rounds: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_turns", 2), ("max_new_tokens", 1), ("throughput_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("history_tokens", "num_repeats", "num_conversations", "num_rounds", "question_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def num_steps(self) -> int:
        return self.num_repeats * self.num_turns + 2 * self.num_rounds

    @property
    def ctx_len(self) -> int:
        """Enough for the longest conversation, and a quarter more."""
        per_turn = self.question_tokens + 16
        first = self.num_turns * (per_turn + self.max_new_tokens)
        whole = (2 * self.num_rounds + 1) * (per_turn + self.throughput_tokens)
        return (self.history_tokens + max(first, whole)) * 5 // 4


@dataclass
class BenchConversation:
    """A conversation on one topic; questions are follow-ups."""

    engine: AI100Engine
    use_cache: bool = True
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def ask(self, question: str, max_tokens: int) -> TimedTokens:
        return timed(
            self.engine,
            "",
            max_tokens,
            add_special_tokens=False,
            messages=({"role": "user", "content": question},),
            conversation_id=self.name,
            options=AI100Options(use_cache=self.use_cache),
        )


def run(engine: AI100Engine, workload: AI100Workload, on_step: Callable[[], None] = lambda: None) -> list[Row]:
    """Rows of `measure` "first token", one for each turn, and of "throughput"."""
    rng = random.Random(workload.seed)
    BenchConversation(engine).ask(_message(engine, workload, 1, rng), 2)
    return [*_first_tokens(engine, workload, rng, on_step), *_throughput(engine, workload, rng, on_step)]


def _first_tokens(
    engine: AI100Engine, workload: AI100Workload, rng: random.Random, on_step: Callable[[], None]
) -> Iterator[Row]:
    """Raises `ValueError` when an answer with the cache isn't the one without."""
    asked: dict[int, list[tuple[TimedTokens, TimedTokens]]] = {}
    for repeat in range(workload.num_repeats):
        talks = BenchConversation(engine), BenchConversation(engine, use_cache=False)
        for turn in range(1, workload.num_turns + 1):
            question = _message(engine, workload, turn, rng)
            order = talks if (repeat + turn) % 2 else talks[::-1]
            answers = {talk.use_cache: talk.ask(question, workload.max_new_tokens) for talk in order}
            if answers[True].token_ids != answers[False].token_ids:
                raise ValueError(f"turn {turn} of repeat {repeat} has another answer with the cache than without")
            asked.setdefault(turn, []).append((answers[True], answers[False]))
            on_step()
    for turn, pairs in asked.items():
        yield {
            "measure": "first token",
            "turn": turn,
            "slots_prefilled_tokens": median_high(_num_prefilled(cached) for cached, _ in pairs),
            "no_cache_prefilled_tokens": median_high(_num_prefilled(uncached) for _, uncached in pairs),
            "slots_ttft_ms": spread([cached.first_token_ms for cached, _ in pairs]),
            "no_cache_ttft_ms": spread([uncached.first_token_ms for _, uncached in pairs]),
            "sooner": ratio_spread([uncached.first_token_ms / cached.first_token_ms for cached, uncached in pairs]),
        }


def _num_prefilled(answer: TimedTokens) -> int:
    return int(answer.report.details["num_prefilled_tokens"])


def _throughput(
    engine: AI100Engine, workload: AI100Workload, rng: random.Random, on_step: Callable[[], None]
) -> Iterator[Row]:
    """Conversations under way: their long first messages lie in their slots before the clock starts."""
    talks = [BenchConversation(engine) for _ in range(workload.num_conversations)]
    for talk in talks:
        talk.ask(_message(engine, workload, 1, rng), 1)
    seconds: dict[str, list[float]] = {AT_ONCE: [], IN_TURN: []}
    for number in range(2 * workload.num_rounds):
        mode = AT_ONCE if number % 2 else IN_TURN
        questions = [_message(engine, workload, 2, rng) for _ in talks]
        started_s = perf_counter()
        with ThreadPoolExecutor(len(talks) if mode == AT_ONCE else 1) as pool:
            list(pool.map(lambda talk, text: talk.ask(text, workload.throughput_tokens), talks, questions))
        seconds[mode].append(perf_counter() - started_s)
        on_step()
    num_tokens = len(talks) * workload.throughput_tokens
    for mode, taken in seconds.items():
        yield {
            "measure": "throughput",
            "mode": mode,
            "num_conversations": len(talks),
            "num_rounds": len(taken),
            "tokens_per_s": spread([num_tokens / passed for passed in taken]),
            "times": ratio_spread([slow / passed for slow, passed in zip(seconds[IN_TURN], taken, strict=True)]),
        }


def _message(engine: AI100Engine, workload: AI100Workload, turn: int, rng: random.Random) -> str:
    """The first has the history; what follows begins as a follow-up does."""

    def count(text: str) -> int:
        return len(engine.tokenizer.encode(text, add_special_tokens=False))

    question = make_text(count, workload.question_tokens, rng).strip()
    return make_text(count, workload.history_tokens, rng) + question if turn == 1 else f"And {question}"


def engine_for(workload: AI100Workload, model: str | None, shape: str | None, runtime: str) -> AI100Engine:
    """One slot more than conversations: turns without the cache run in it."""
    num = workload.num_conversations
    own = AI100Settings(
        runtime,  # type: ignore[arg-type]  # the registry refuses others
        full_batch_size=num,
        kv_cache_batch_size=num + 1,
        ctx_len=workload.ctx_len,
        prefill_seq_len=min(128, workload.ctx_len),
        max_context=workload.ctx_len,
    )
    name = shape or model or "town"
    folder = model_folder(model, shape)
    return open_engine(EngineSettings(own, folder, random_weights=shape is not None, served_model_name=name))


def show_rows(rows: Sequence[Row], console: Console) -> None:
    turns = [row for row in rows if row["measure"] == "first token"]
    figures = {
        "turn": "{turn}",
        "prefilled": "{slots_prefilled_tokens:,}",
        "slots ms": "{slots_ttft_ms[median]:,.1f}",
        "prefilled ": "{no_cache_prefilled_tokens:,}",
        "no cache ms": "{no_cache_ttft_ms[median]:,.1f}",
        "speedup": "{sooner[median]:,.1f}x",
    }
    console.print(table_of("Time to first token; medians", turns, {}, figures))
    if speedup := ratio_spread([row["sooner"]["median"] for row in turns if row["turn"] > 1]):
        console.print("Speedup of follow-ups: {median:.1f}x ({low:.1f} to {high:.1f})".format_map(speedup))
    figures = {
        "tokens/s": "{tokens_per_s[median]:,.1f}",
        "times": "{times[median]:.2f}x",
        "least to most": "{times[low]:.2f} to {times[high]:.2f}",
    }
    modes = [row for row in rows if row["measure"] == "throughput"]
    console.print(table_of("Throughput", modes, {"conversations": "{num_conversations} {mode}"}, figures))
