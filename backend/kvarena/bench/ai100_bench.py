"""What KV slots gain in multi-turn chat: time to first token of follow-ups, and throughput of several conversations.

First token: conversations with a long first message, every turn asked with and without the cache, alternating.
Throughput: conversations in progress, one turn of all of them at once and one turn of one after the other,
alternating.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from rich.console import Console

from ai100.engine import AI100Engine, AI100Options
from ai100.settings import EngineSettings, open_engine
from kvarena.bench.console import new_table
from kvarena.bench.prefix_bench import make_text
from kvarena.bench.results import Row, ratio_spread, spread
from kvarena.bench.shapes import model_folder
from kvarena.contenders.ai100 import AI100Settings
from kvarena.engines.base import GenerationRequest, Sampling

CACHED, UNCACHED = "slots", "no cache"
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
        """What the longest conversation needs, and a quarter more."""
        per_turn = self.question_tokens + 16
        first = self.num_turns * (per_turn + self.max_new_tokens)
        whole = (2 * self.num_rounds + 1) * (per_turn + self.throughput_tokens)
        return (self.history_tokens + max(first, whole)) * 5 // 4


@dataclass(frozen=True)
class TimedAnswer:
    first_token_ms: float
    total_ms: float
    token_ids: tuple[int, ...]
    num_prefilled_tokens: int


@dataclass
class BenchConversation:
    """A conversation with the engine, of one topic; questions are follow-ups."""

    engine: AI100Engine
    use_cache: bool = True
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def ask(self, question: str, max_tokens: int) -> TimedAnswer:
        request = GenerationRequest(
            uuid.uuid4().hex,
            "",
            Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            add_special_tokens=False,
            messages=({"role": "user", "content": question},),
            conversation_id=self.name,
            options=AI100Options(use_cache=self.use_cache),
        )
        started_s, first_s = perf_counter(), 0.0
        token_ids = []
        generation = self.engine.generate(request)
        for token in generation:
            first_s = first_s or perf_counter()
            token_ids.append(token.token_id)
        ended_s = perf_counter()
        prefilled: int = generation.report.details["num_prefilled_tokens"]
        return TimedAnswer(1e3 * (first_s - started_s), 1e3 * (ended_s - started_s), tuple(token_ids), prefilled)


def run(engine: AI100Engine, workload: AI100Workload, on_step: Callable[[], None] = lambda: None) -> list[Row]:
    """Rows of `measure` "first token", one for each turn, and of "throughput"."""
    rng = random.Random(workload.seed)
    BenchConversation(engine).ask(_message(engine, workload, 1, rng), 2)
    return [*_first_tokens(engine, workload, rng, on_step), *_throughput(engine, workload, rng, on_step)]


def _first_tokens(
    engine: AI100Engine, workload: AI100Workload, rng: random.Random, on_step: Callable[[], None]
) -> Iterator[Row]:
    """Raises `ValueError` when an answer with the cache isn't the one without."""
    asked: dict[int, list[tuple[TimedAnswer, TimedAnswer]]] = {}
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
            "slots_prefilled_tokens": _median([cached.num_prefilled_tokens for cached, _ in pairs]),
            "no_cache_prefilled_tokens": _median([uncached.num_prefilled_tokens for _, uncached in pairs]),
            "slots_ttft_ms": spread([cached.first_token_ms for cached, _ in pairs]),
            "no_cache_ttft_ms": spread([uncached.first_token_ms for _, uncached in pairs]),
            "sooner": ratio_spread([uncached.first_token_ms / cached.first_token_ms for cached, uncached in pairs]),
        }


def _throughput(
    engine: AI100Engine, workload: AI100Workload, rng: random.Random, on_step: Callable[[], None]
) -> Iterator[Row]:
    """Conversations under way: their long first messages lie in their slots before the clock starts."""
    talks = [BenchConversation(engine) for _ in range(workload.num_conversations)]
    for talk in talks:
        talk.ask(_message(engine, workload, 1, rng), 1)
    seconds: dict[str, list[float]] = {AT_ONCE: [], IN_TURN: []}
    num_steps = {AT_ONCE: 0, IN_TURN: 0}
    for number in range(2 * workload.num_rounds):
        mode = AT_ONCE if number % 2 else IN_TURN
        questions = [_message(engine, workload, 2, rng) for _ in talks]
        started_s = perf_counter()
        with ThreadPoolExecutor(len(talks) if mode == AT_ONCE else 1) as pool:
            list(pool.map(lambda talk, text: talk.ask(text, workload.throughput_tokens), talks, questions))
        seconds[mode].append(perf_counter() - started_s)
        num_steps[mode] += 1
        on_step()
    num_tokens = len(talks) * workload.throughput_tokens
    for mode, taken in seconds.items():
        yield {
            "measure": "throughput",
            "mode": mode,
            "num_conversations": len(talks),
            "num_rounds": num_steps[mode],
            "tokens_per_s": spread([num_tokens / passed for passed in taken]),
            "times": ratio_spread([slow / passed for slow, passed in zip(seconds[IN_TURN], taken, strict=True)]),
        }


def follow_up_speedup(rows: Sequence[Row]) -> dict[str, float]:
    """Of all turns but the first."""
    return ratio_spread(
        [row["sooner"]["median"] for row in rows if row["measure"] == "first token" and row["turn"] > 1]
    )


def _message(engine: AI100Engine, workload: AI100Workload, turn: int, rng: random.Random) -> str:
    """The first has the history; what follows begins as a follow-up does."""

    def count(text: str) -> int:
        return len(engine.tokenizer.encode(text, add_special_tokens=False))

    question = make_text(count, workload.question_tokens, rng).strip()
    return make_text(count, workload.history_tokens, rng) + question if turn == 1 else f"And {question}"


def _median(counts: Sequence[int]) -> int:
    return sorted(counts)[len(counts) // 2]


def settings(workload: AI100Workload, **more: Any) -> dict[str, Any]:
    """As they go into the result file."""
    return {"benchmark": "ai100", **more, **vars(workload)}


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
    figures = ("turn", "prefilled", "slots ms", "prefilled", "no cache ms", "speedup")
    turns = new_table("Time to first token; medians", figures=figures)
    modes = new_table("Throughput", "conversations", figures=("tokens/s", "times", "least to most"))
    for row in rows:
        if row["measure"] == "first token":
            turns.add_row(
                str(row["turn"]),
                f"{row['slots_prefilled_tokens']:,}",
                f"{row['slots_ttft_ms']['median']:,.1f}",
                f"{row['no_cache_prefilled_tokens']:,}",
                f"{row['no_cache_ttft_ms']['median']:,.1f}",
                f"{row['sooner']['median']:,.1f}x",
            )
        else:
            times = row["times"]
            modes.add_row(
                f"{row['num_conversations']} {row['mode']}",
                f"{row['tokens_per_s']['median']:,.1f}",
                f"{times['median']:.2f}x",
                f"{times['low']:.2f} to {times['high']:.2f}",
            )
    console.print(turns)
    speedup = follow_up_speedup(rows)
    console.print(f"Speedup of follow-ups: {speedup['median']:.1f}x ({speedup['low']:.1f} to {speedup['high']:.1f})")
    console.print(modes)
