"""`kvarena bench prefix` and `decode`: what caching gains before the first token, and the time of each token after it.

`prefix` compares no KV cache, a KV cache and a prefix cache. Three requests for each context, in order: the context
with a question, cold; the same once more; the same context with another question. Every repetition makes new contexts,
so that nothing but these three shares anything. Measured is an engine in this process, or the contender `prefix` at an
address.

`decode` compares the PyTorch engine, Hugging Face `generate` on the same weights, and a server; one request at a time,
in turn, so that a slower minute of the machine meets all of them. The first token belongs to the prefill.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from kvarena.bench.console import table_of
from kvarena.bench.measure import timed
from kvarena.bench.results import Row, ratio_spread, spread
from kvarena.bench.shapes import model_folder
from kvarena.client import COMPLETIONS, ClientError, connect
from kvarena.contenders.prefix.engine import PrefixEngine, PrefixOptions
from kvarena.contenders.servers import GIB
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
    """One answer. `first_token_ms` is everything before the first token, looking up and moving KV included."""

    first_token_ms: float
    total_ms: float
    num_answer_tokens: int
    num_prompt_tokens: int
    num_reused_tokens: int

    @property
    def tpot_ms(self) -> float:
        return (self.total_ms - self.first_token_ms) / max(1, self.num_answer_tokens - 1)


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
        found: dict[tuple[str, str], list[Timed]] = {}
        for _ in range(workload.num_requests):
            for level in workload.levels:  # in turn, so that a slower minute of the machine meets all of them
                answers = _three_requests(target, workload, level, num_tokens, rng)
                for scenario, answer in zip(SCENARIOS, answers, strict=True):
                    found.setdefault((level, scenario), []).append(answer)
                on_step()
        rows += _rows(found)
    return rows


def _three_requests(
    target: PrefixTarget, workload: PrefixWorkload, level: str, num_tokens: int, rng: random.Random
) -> list[Timed]:
    context = make_text(target.count, num_tokens, rng)
    first, second = (make_text(target.count, QUESTION_TOKENS, rng) for _ in range(2))
    prompts = (context + first, context + first, context + second)
    return [target.generate(prompt, workload.max_new_tokens, LEVELS[level]) for prompt in prompts]


def make_text(count: Callable[[str], int], num_tokens: int, rng: random.Random) -> str:
    """Sentences of about so many tokens, at least one, and different in every call."""
    sentences = [f"Note {rng.randrange(10**9)}:"]
    per_sentence = max(1, count(_sentence(rng) * 8) // 8)
    sentences += [_sentence(rng) for _ in range(max(1, num_tokens // per_sentence))]
    while len(sentences) > 2 and count(" ".join(sentences)) > num_tokens:
        sentences.pop()
    return " ".join(sentences) + "\n"


def _sentence(rng: random.Random) -> str:
    return f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}."


def _rows(found: dict[tuple[str, str], list[Timed]]) -> Iterator[Row]:
    for (level, scenario), answers in found.items():
        cold = found[level, "cold"]
        yield {
            "level": level,
            "scenario": scenario,
            "context_tokens": round(fmean(answer.num_prompt_tokens for answer in answers)),
            "num_requests": len(answers),
            "reused_ratio": round(fmean(a.num_reused_tokens / a.num_prompt_tokens for a in answers), 4),
            "ttft_ms": spread([answer.first_token_ms for answer in answers]),
            "tpot_ms": spread([answer.tpot_ms for answer in answers]),
            "total_ms": spread([answer.total_ms for answer in answers]),
            "speedup_vs_cold": ratio_spread(
                [before.first_token_ms / after.first_token_ms for before, after in zip(cold, answers, strict=True)]
            ),
        }


class InProcess:
    """Timed from the call to the first token and to the last, as the caller of the engine sees it."""

    def __init__(self, engine: PrefixEngine) -> None:
        self._engine = engine

    def count(self, text: str) -> int:
        return len(self._engine.tokenizer.encode(text))

    def generate(self, prompt: str, max_new_tokens: int, options: dict[str, bool]) -> Timed:
        answer = timed(self._engine, prompt, max_new_tokens, options=PrefixOptions(**options))
        return Timed(
            answer.first_token_ms,
            answer.total_ms,
            len(answer.token_ids),
            answer.report.num_prompt_tokens,
            answer.report.num_reused_tokens,
        )


class ServerTarget:
    """Timed by the server: `/generate` answers as a whole. Raises `ValueError` where no `prefix` answers."""

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


PrefixTarget = InProcess | ServerTarget


@contextmanager
def _as_value_error(url: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        raise ValueError(f"{url}: {error}") from error


def find_target(
    url: str | None, model: str | None, shape: str | None, cache_gb: float, storage: str
) -> tuple[PrefixTarget, dict[str, object]]:
    """What is measured, and its settings for the result file."""
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
    figures = {
        "prompt": "{context_tokens:,}",
        "reused": "{reused_ratio:.0%}",
        "TTFT ms": "{ttft_ms[median]:,.1f}",
        "ms/token": "{tpot_ms[median]:,.1f}",
        "speedup": "{speedup_vs_cold[median]:,.1f}x",
    }
    title = "Time to first token, lookup and transfer included; medians"
    console.print(table_of(title, rows, {"scenario": "{scenario}"}, figures, section=lambda row: str(row["level"])))


ENGINE = "prefix engine"
GENERATE = "Hugging Face generate"

Decode = Callable[[Sequence[int], int], list[float]]
"""Token ids and a number of new tokens to times in seconds: the first token's first, the last one's last."""


@dataclass(frozen=True)
class DecodeWorkload:
    """Prompts of random tokens."""

    context_tokens: tuple[int, ...] = (128, 1024)
    max_new_tokens: int = 33
    num_requests: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests < 1 or self.max_new_tokens < 2 or not self.context_tokens or min(self.context_tokens) < 1:
            raise ValueError("a workload needs a request, two new tokens and contexts of a token or more")

    @property
    def num_steps(self) -> int:
        return len(self.context_tokens) * self.num_requests


def run_decode(
    contenders: dict[str, Decode], vocab_size: int, workload: DecodeWorkload, on_step: Callable[[], None]
) -> list[Row]:
    """A row for each context length and contender, after a warm-up; `ratio_to_engine` is taken request by request."""
    rng = random.Random(workload.seed)
    rows: list[Row] = []
    for num_tokens in workload.context_tokens:
        prompts = [rng.choices(range(10, vocab_size), k=num_tokens) for _ in range(workload.num_requests + 1)]
        for decode in contenders.values():
            decode(prompts[0], workload.max_new_tokens)
        tpot_ms: dict[str, list[float]] = {name: [] for name in contenders}
        for prompt in prompts[1:]:
            for name, decode in contenders.items():
                times_s = decode(prompt, workload.max_new_tokens)
                tpot_ms[name].append(1000 * (times_s[-1] - times_s[0]) / (workload.max_new_tokens - 1))
            on_step()
        rows += [
            {
                "contender": name,
                "context_tokens": num_tokens,
                "num_requests": workload.num_requests,
                "tpot_ms": spread(values),
                "ratio_to_engine": ratio_spread([v / own for v, own in zip(values, tpot_ms[ENGINE], strict=True)]),
            }
            for name, values in tpot_ms.items()
        ]
    return rows


def engine_decode(engine: PrefixEngine) -> Decode:
    return lambda prompt, max_new_tokens: list(timed(engine, prompt, max_new_tokens).times_s)


def generate_decode(path: str, model: HFModel, random_weights: bool) -> Decode:
    """Hugging Face's own loop with its default cache and attention, in the thread that the engine's model uses."""
    if random_weights:
        config = AutoConfig.from_pretrained(path)
        reference: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    else:
        reference = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    reference.to(model.kv_shape.device).eval()

    class Clock(BaseStreamer):
        """Hears of the prompt first, then of each token."""

        def __init__(self) -> None:
            self.times_s: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times_s.append(perf_counter())

        def end(self) -> None:
            """Nothing is held back."""

    def decode(prompt: Sequence[int], max_new_tokens: int) -> list[float]:
        ids, clock = torch.tensor([list(prompt)], device=model.kv_shape.device), Clock()
        reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=clock,
        )
        return clock.times_s[1:]

    return lambda prompt, max_new_tokens: model.run(decode, prompt, max_new_tokens)


def server_decode(url: str, api_key: str = "") -> Decode:
    """A server that speaks OpenAI's API and takes token ids. Raises `ValueError` when it doesn't answer."""
    client, server = connect("--url", url, api_key)

    def decode(prompt: Sequence[int], max_new_tokens: int) -> list[float]:
        body = {
            "model": server.model,
            "prompt": list(prompt),
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        with _as_value_error(url):
            return [token.time_s for token in client.stream(COMPLETIONS, body).tokens]

    return decode


def show_decode_rows(rows: Sequence[Row], console: Console) -> None:
    figures = {
        "prompt": "{context_tokens:,}",
        "ms/token": "{tpot_ms[median]:,.2f}",
        "of engine's": "{ratio_to_engine[median]:.2f}x",
        "least to most": "{ratio_to_engine[low]:.2f} to {ratio_to_engine[high]:.2f}",
    }
    console.print(table_of("Time per output token; medians", rows, {"contender": "{contender}"}, figures))
