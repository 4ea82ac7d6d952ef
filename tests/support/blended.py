"""A blender over a tiny model, beside the same weights in stock Hugging Face."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kvarena.core.store import ChunkStore
from kvarena.engines.hf.blend import BlendedPrefill, HFBlender
from kvarena.engines.hf.model import HFModel
from kvarena.policies.params import BlendParams
from kvarena.stores.memory import MemoryStore
from support.tiny_models import random_text

SEPARATOR = " # # "


def make_prompts(seed: int, count: int, *, first_words: int = 3) -> list[str]:
    """Prompts over one pool of chunks, several in each, in changing order; with 3 words before them, no chunk's own."""
    rng = random.Random(seed)
    pool = [random_text(rng, rng.choice([20, 35, 60])) for _ in range(5)]
    return [
        SEPARATOR.join([random_text(rng, first_words), *rng.sample(pool, 4), random_text(rng, 5)]) for _ in range(count)
    ]


@dataclass
class Blended:
    model: HFModel
    reference: Any
    store: ChunkStore = field(default_factory=lambda: MemoryStore(1 << 28))

    def __post_init__(self) -> None:
        self.blender = HFBlender(self.model, self.store, separator=SEPARATOR)

    @classmethod
    def load(cls, folder: Path, **settings: Any) -> Blended:
        model = HFModel.load(str(folder), device="cpu", dtype="float32")
        return cls(model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), **settings)

    def encode(self, prompt: str) -> list[int]:
        return self.model.tokenizer.encode(prompt)

    def prefill(self, ids: list[int], params: BlendParams) -> BlendedPrefill:
        """Checks the counts of every prefill."""
        result = self.blender.prefill(ids, params, capacity=64)
        report = result.report
        assert report.num_reused_tokens + report.num_recomputed_tokens + report.num_computed_tokens == len(ids)
        assert min(report.num_reused_tokens, report.num_recomputed_tokens, report.num_computed_tokens) >= 0
        in_spans = sum(end - start for start, end in report.spans)
        assert in_spans == report.num_reused_tokens + report.num_recomputed_tokens
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(report.spans))
        assert result.kv.length == len(ids)
        return result

    def greedy(self, result: BlendedPrefill, num_tokens: int) -> list[int]:
        answer = [int(result.logits.argmax())]
        while len(answer) < num_tokens:
            answer.append(int(self.model.decode(result.kv, answer[-1]).argmax()))
        return answer

    def generate(self, ids: list[int], num_tokens: int) -> list[int]:
        """Hugging Face's own answer."""
        prompt = torch.tensor([ids])
        lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        output = self.reference.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **lengths)
        answer: list[int] = output[0, len(ids) :].tolist()
        return answer

    @torch.inference_mode()
    def blind(self, ids: list[int], spans: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Naive reuse, as one stock forward in which spans attend to themselves only: KV `(L, 2, H_kv, T, D)` and the
        last logits. Rotary distances inside a span are the same wherever it stands, so nothing needs moving.
        """
        cache = DynamicCache()
        output = self.reference(torch.tensor([ids]), attention_mask=blind_mask(ids, spans), past_key_values=cache)
        return cached_kv(cache), output.logits[0, -1]

    @torch.inference_mode()
    def attention_of_question(self, ids: list[int], spans: list[tuple[int, int]], layer: int) -> torch.Tensor:
        """What the reused tokens `(T_reused,)` get at a layer of the attention of the tokens behind the last span but
        for the last token, among themselves: averaged over heads, from stock eager attention's own weights.
        """
        self.reference.set_attn_implementation("eager")
        try:
            mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill_(~blind_mask(ids, spans), float("-inf"))
            output = self.reference(torch.tensor([ids]), attention_mask=mask, output_attentions=True)
        finally:
            self.reference.set_attn_implementation("sdpa")
        reused = torch.cat([torch.arange(start, end) for start, end in spans])
        weights = output.attentions[layer][0, :, spans[-1][1] : -1, reused]  # (H, T_q, T_reused)
        mean: torch.Tensor = (weights / weights.sum(dim=-1, keepdim=True)).mean(dim=(0, 1))
        return mean


def blind_mask(ids: list[int], spans: list[tuple[int, int]]) -> torch.Tensor:
    """`(1, 1, T, T)`: causal, and a span's tokens see nothing before it."""
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for start, end in spans:
        mask[start:end, :start] = False
    return mask[None, None]


def cached_kv(cache: Any) -> torch.Tensor:
    """`(L, 2, H_kv, T, D)`."""
    return torch.stack([torch.cat([layer.keys, layer.values]) for layer in cache.layers])
