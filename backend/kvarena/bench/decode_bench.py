"""Time per output token of the PyTorch engine, of Hugging Face `generate` on the same weights, and of a server.

One request at a time, contenders in turn, so that a slower minute of the machine meets all of them. The first
token belongs to the prefill and is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from kvarena.bench.console import new_table
from kvarena.bench.results import Row, ratio_spread, spread
from kvarena.client import COMPLETIONS, ClientError, connect
from kvarena.contenders.prefix.engine import PrefixEngine
from kvarena.engines.base import GenerationRequest, Sampling
from kvarena.engines.hf.model import HFModel

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


def run(
    contenders: dict[str, Decode], vocab_size: int, workload: DecodeWorkload, on_step: Callable[[], None]
) -> list[Row]:
    """A row for each context length and contender; `ratio_to_engine` is taken request by request."""
    rng = random.Random(workload.seed)
    rows: list[Row] = []
    for num_tokens in workload.context_tokens:
        prompts = [rng.choices(range(10, vocab_size), k=num_tokens) for _ in range(workload.num_requests + 1)]
        for decode in contenders.values():
            decode(prompts[0], workload.max_new_tokens)  # warm-up
        tpot_ms: dict[str, list[float]] = {name: [] for name in contenders}
        for prompt in prompts[1:]:
            for name, decode in contenders.items():
                times_s = decode(prompt, workload.max_new_tokens)
                tpot_ms[name].append(1000 * (times_s[-1] - times_s[0]) / (workload.max_new_tokens - 1))
            on_step()
        for name, values in tpot_ms.items():
            ratios = [value / engine for value, engine in zip(values, tpot_ms[ENGINE], strict=True)]
            rows.append(
                {
                    "contender": name,
                    "context_tokens": num_tokens,
                    "num_requests": workload.num_requests,
                    "tpot_ms": spread(values),
                    "ratio_to_engine": ratio_spread(ratios),
                }
            )
    return rows


def engine_decode(engine: PrefixEngine) -> Decode:
    def decode(prompt: Sequence[int], max_new_tokens: int) -> list[float]:
        sampling = Sampling(max_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)
        return [perf_counter() for _ in engine.generate(GenerationRequest("bench", tuple(prompt), sampling))]

    return decode


def generate_decode(path: str, model: HFModel, random_weights: bool) -> Decode:
    """Hugging Face's own loop with its default cache and attention, in the thread that the engine's model uses."""
    if random_weights:
        from transformers import AutoConfig

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
        try:
            return [token.time_s for token in client.stream(COMPLETIONS, body).tokens]
        except ClientError as error:
            raise ValueError(f"{url}: {error}") from error

    return decode


def show_rows(rows: Sequence[Row], console: Console) -> None:
    figures = ("prompt", "ms/token", "of engine's", "least to most")
    table = new_table("Time per output token; medians", "contender", figures=figures)
    for row in rows:
        ratio = row["ratio_to_engine"]
        table.add_row(
            row["contender"],
            f"{row['context_tokens']:,}",
            f"{row['tpot_ms']['median']:,.2f}",
            f"{ratio['median']:.2f}x",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}",
        )
    console.print(table)
