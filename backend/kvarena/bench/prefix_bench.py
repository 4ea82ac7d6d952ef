"""What each layer of caching gains on one prompt: no KV cache, a KV cache, a prefix cache.

Three requests for each context, in order: the context with a question, cold; the same once more; the same context
with another question. Contexts are made anew for every repetition, so that nothing but these three share anything.
Measured is an engine in this process, or the `prefix` contender at an address.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from rich.console import Console

from kvarena.bench.console import new_table
from kvarena.bench.results import Row, ratio_spread, spread
from kvarena.bench.shapes import model_folder
from kvarena.client import ClientError, connect
from kvarena.contenders.prefix.engine import PrefixEngine, PrefixOptions
from kvarena.contenders.servers import GIB
from kvarena.engines.base import GenerationRequest, Sampling
from kvarena.engines.hf.model import HFModel
from kvarena.stack.settings import shown_api_key

LEVELS: dict[str, dict[str, bool]] = {
    "no KV cache": {"use_cache": False, "use_prefix_cache": False},
    "KV cache": {"use_cache": True, "use_prefix_cache": False},
    "prefix cache": {"use_cache": True, "use_prefix_cache": True},
}
SCENARIOS = ("cold", "repeat", "new question")
QUESTION_TOKENS = 20
NOUNS = [
    "baker",
    "harbour",
    "lamp",
    "river",
    "stone",
    "market",
    "bridge",
    "garden",
    "clock",
    "ladder",
    "kettle",
    "window",
]
VERBS = ["sees", "keeps", "finds", "sells", "paints", "mends", "counts", "carries"]


@dataclass(frozen=True)
class Timed:
    """One answer. `first_token_ms` counts everything before the first token, looking up and moving KV included."""

    first_token_ms: float
    total_ms: float
    num_answer_tokens: int
    num_prompt_tokens: int
    num_reused_tokens: int


class PrefixTarget(Protocol):
    """What is measured: an engine in this process, or a server."""

    def count(self, text: str) -> int:
        """How many tokens."""
        ...

    def generate(self, prompt: str, max_new_tokens: int, options: dict[str, bool]) -> Timed: ...


@dataclass(frozen=True)
class PrefixWorkload:
    """`num_requests` repetitions of each; the first of all is a warm-up and left out."""

    context_tokens: tuple[int, ...] = (470, 1000, 4000)
    levels: tuple[str, ...] = tuple(LEVELS)
    num_requests: int = 3
    max_new_tokens: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [level for level in self.levels if level not in LEVELS]:
            raise ValueError(f"no level {unknown[0]!r}; there are {', '.join(LEVELS)}")
        if self.num_requests < 1 or self.max_new_tokens < 2 or not self.context_tokens or min(self.context_tokens) < 1:
            raise ValueError("a workload needs a request, two new tokens and contexts of a token or more")

    @property
    def num_steps(self) -> int:
        return len(self.context_tokens) * len(self.levels) * self.num_requests


def run(target: PrefixTarget, workload: PrefixWorkload, on_step: Callable[[], None] = lambda: None) -> list[Row]:
    """A row for each context length, level and scenario."""
    rng = random.Random(workload.seed)
    _three_requests(target, workload, workload.levels[-1], min(workload.context_tokens), rng)
    rows: list[Row] = []
    for num_tokens in workload.context_tokens:
        timed: dict[tuple[str, str], list[Timed]] = {}
        for _ in range(workload.num_requests):
            for level in workload.levels:  # in turn, so that a slower minute of the machine meets all of them
                answers = _three_requests(target, workload, level, num_tokens, rng)
                for scenario, answer in zip(SCENARIOS, answers, strict=True):
                    timed.setdefault((level, scenario), []).append(answer)
                on_step()
        rows += _rows(timed)
    return rows


def _three_requests(
    target: PrefixTarget, workload: PrefixWorkload, level: str, num_tokens: int, rng: random.Random
) -> list[Timed]:
    context = make_text(target.count, num_tokens, rng)
    first, second = (make_text(target.count, QUESTION_TOKENS, rng) for _ in range(2))
    prompts = (context + first, context + first, context + second)
    return [target.generate(prompt, workload.max_new_tokens, LEVELS[level]) for prompt in prompts]


def make_text(count: Callable[[str], int], num_tokens: int, rng: random.Random) -> str:
    """Sentences of about so many tokens, at least one, that no other call has made."""
    sentences = [f"Note {rng.randrange(10**9)}:"]
    per_sentence = max(1, count(_sentence(rng) * 8) // 8)
    sentences += [_sentence(rng) for _ in range(max(1, num_tokens // per_sentence))]
    while len(sentences) > 2 and count(" ".join(sentences)) > num_tokens:
        sentences.pop()
    return " ".join(sentences) + "\n"


def _sentence(rng: random.Random) -> str:
    return f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}."


def _rows(timed: dict[tuple[str, str], list[Timed]]) -> Iterator[Row]:
    for (level, scenario), answers in timed.items():
        cold = timed[level, "cold"]
        yield {
            "level": level,
            "scenario": scenario,
            "context_tokens": round(_mean([answer.num_prompt_tokens for answer in answers])),
            "num_requests": len(answers),
            "reused_ratio": round(_mean([a.num_reused_tokens / a.num_prompt_tokens for a in answers]), 4),
            "ttft_ms": spread([answer.first_token_ms for answer in answers]),
            "tpot_ms": spread([_tpot_ms(answer) for answer in answers]),
            "total_ms": spread([answer.total_ms for answer in answers]),
            "speedup_vs_cold": ratio_spread(
                [before.first_token_ms / after.first_token_ms for before, after in zip(cold, answers, strict=True)]
            ),
        }


def _tpot_ms(answer: Timed) -> float:
    return (answer.total_ms - answer.first_token_ms) / max(1, answer.num_answer_tokens - 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def settings(workload: PrefixWorkload, **more: Any) -> dict[str, Any]:
    """As they go into the result file."""
    return {"benchmark": "prefix", **more, **vars(workload)}


class InProcess:
    """Timed from the call to the first token and to the last, as the caller of the engine sees it."""

    def __init__(self, engine: PrefixEngine) -> None:
        self._engine = engine

    def count(self, text: str) -> int:
        return len(self._engine.tokenizer.encode(text))

    def generate(self, prompt: str, max_new_tokens: int, options: dict[str, bool]) -> Timed:
        sampling = Sampling(max_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(uuid.uuid4().hex, prompt, sampling, options=PrefixOptions(**options))
        started_s, first_s, num_tokens = perf_counter(), 0.0, 0
        generation = self._engine.generate(request)
        for _ in generation:
            num_tokens += 1
            first_s = first_s or perf_counter()
        ended_s, report = perf_counter(), generation.report
        return Timed(
            first_token_ms=1000 * (first_s - started_s),
            total_ms=1000 * (ended_s - started_s),
            num_answer_tokens=num_tokens,
            num_prompt_tokens=report.num_prompt_tokens,
            num_reused_tokens=report.num_reused_tokens,
        )


class ServerTarget:
    """Timed by the server: `/generate` answers as a whole. Raises `ValueError` when the address is no `prefix`."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self._client, server = connect("--url", url, api_key)
        self._model = server.model
        if server.contender != "prefix":
            raise ValueError(f"{url} is not a prefix contender")

    def count(self, text: str) -> int:
        with _as_value_error(self._client.url):
            return len(self._client.token_ids({"model": self._model, "prompt": text}))

    def generate(self, prompt: str, max_new_tokens: int, options: dict[str, bool]) -> Timed:
        body = {"prompt": prompt, "max_new_tokens": max_new_tokens, "ignore_eos": True, **options}
        with _as_value_error(self._client.url):
            answer = self._client.post("/generate", body)
        timings = answer["timings"]
        return Timed(
            first_token_ms=timings["first_token_ms"],
            total_ms=timings["total_ms"],
            num_answer_tokens=answer["num_answer_tokens"],
            num_prompt_tokens=answer["num_prompt_tokens"],
            num_reused_tokens=timings["prefix_tokens_saved"],
        )


@contextmanager
def _as_value_error(url: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        raise ValueError(f"{url}: {error}") from error


def find_target(
    url: str | None, model: str | None, shape: str | None, cache_gb: float, storage: str
) -> tuple[PrefixTarget, dict[str, object]]:
    """What is measured, and what the result file says of it."""
    if url:
        if model or shape:
            raise ValueError("--url measures the server's own model; --model and --shape go without it")
        return ServerTarget(url, shown_api_key()), {"url": url}
    engine = open_engine(model_folder(model, shape), model, shape, cache_gb, storage)
    return InProcess(engine), {"model": engine.model_name, "storage": storage, "cache_gb": cache_gb}


def open_engine(
    folder: str, model: str | None, shape: str | None, cache_gb: float = 0.0, storage: str = "cpu"
) -> PrefixEngine:
    loaded = HFModel.load(folder, random=shape is not None)
    return PrefixEngine(loaded, shape or model or "town", cache_bytes=int(cache_gb * GIB), storage=storage)


def show_rows(rows: Sequence[Row], console: Console) -> None:
    title = "Time to first token, lookup and transfer included; medians"
    table = new_table(title, "level", "scenario", figures=("prompt", "reused", "TTFT ms", "ms/token", "speedup"))
    for row in rows:
        table.add_row(
            row["level"],
            row["scenario"],
            f"{row['context_tokens']:,}",
            f"{row['reused_ratio']:.0%}",
            f"{row['ttft_ms']['median']:,.1f}",
            f"{row['tpot_ms']['median']:,.1f}",
            f"{row['speedup_vs_cold']['median']:,.1f}x",
            end_section=row["scenario"] == "new question",
        )
    console.print(table)
