"""A blender over a tiny model, beside the same weights in stock Hugging Face."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kvarena.core.report import BlendReport
from kvarena.core.store import ScoredStore
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
    store: ScoredStore = field(default_factory=lambda: MemoryStore(1 << 28))
    sink: Sequence[int] = (0,)
    """What chunks must be computed after; the tiny models' beginning-of-text token where nobody says otherwise."""

    def __post_init__(self) -> None:
        self.blender = HFBlender(self.model, self.store, separator=SEPARATOR, sink_tokens=len(self.sink))

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
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(chunk_spans(report)))
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
        """Naive reuse, as one stock forward in which spans attend to themselves only, and to a sink of their own: KV
        `(L, 2, H_kv, T, D)` and the last logits. Rotary distances inside a span are the same wherever it stands, so
        nothing needs moving.
        """
        cache = DynamicCache()
        output = self._blind_forward(ids, spans, past_key_values=cache)
        return cached_kv(cache)[:, :, :, -len(ids) :], output.logits[0, -1]

    def _blind_forward(self, ids: list[int], spans: list[tuple[int, int]], **arguments: Any) -> Any:
        """Over a sink for each span, one after the other, and then the prompt."""
        mask = blind_mask(ids, spans, len(self.sink))
        before = [torch.arange(start - len(self.sink), start) for start, _ in spans]
        positions = torch.cat([*before, torch.arange(len(ids))])[None]
        config = self.reference.config
        masks = {"full_attention": mask}
        if window := getattr(config, "sliding_window", None):
            masks["sliding_attention"] = mask & (positions[0][:, None] - positions[0] < window)
        if arguments.get("output_attentions"):
            masks = {kind: torch.zeros(own.shape).masked_fill_(~own, float("-inf")) for kind, own in masks.items()}
        kinds = set(getattr(config, "layer_types", None) or [list(masks)[-1]])
        given = masks if len(kinds) > 1 else masks[kinds.pop()]
        input_ids = torch.tensor([[*self.sink] * len(spans) + ids])
        return self.reference(input_ids, attention_mask=given, position_ids=positions, **arguments)

    @torch.inference_mode()
    def attention_of_question(self, ids: list[int], spans: list[tuple[int, int]], layer: int) -> torch.Tensor:
        """What the reused tokens `(T_reused,)` get at a layer of the attention of the tokens after the last span but
        for the last token, among themselves: averaged over heads, from stock eager attention's own weights.
        """
        self.reference.set_attn_implementation("eager")
        try:
            output = self._blind_forward(ids, spans, output_attentions=True)
        finally:
            self.reference.set_attn_implementation("sdpa")
        sinks = len(spans) * len(self.sink)
        reused = sinks + torch.cat([torch.arange(start, end) for start, end in spans])
        weights = output.attentions[layer][0, :, sinks + spans[-1][1] : -1, reused]  # (H, T_q, T_reused)
        mean: torch.Tensor = (weights / weights.sum(dim=-1, keepdim=True)).mean(dim=(0, 1))
        return mean


def chunk_spans(report: BlendReport) -> list[tuple[int, int]]:
    """What came from chunks: out of the store, or computed alone."""
    return sorted(report.spans + report.computed_spans)


def blind_mask(ids: list[int], spans: list[tuple[int, int]], sink_tokens: int) -> torch.Tensor:
    """`(1, 1, T, T)` of a sink for each span and the prompt: causal, a span's tokens see nothing before it but its
    sink, and nobody else sees that.
    """
    sinks = len(spans) * sink_tokens
    mask = torch.ones(sinks + len(ids), sinks + len(ids), dtype=torch.bool).tril()
    mask[sinks:, :sinks] = False
    for number, (start, end) in enumerate(spans):
        own = slice(number * sink_tokens, (number + 1) * sink_tokens)
        mask[own, : own.start] = False
        mask[sinks + start : sinks + end, : sinks + start] = False
        mask[sinks + start : sinks + end, own] = True
    return mask[None, None]


def cached_kv(cache: Any) -> torch.Tensor:
    """`(L, 2, H_kv, T, D)`."""
    return torch.stack([torch.cat([layer.keys, layer.values]) for layer in cache.layers])
