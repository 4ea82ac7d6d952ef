"""Reuse written out plainly over Hugging Face's Llama and its kin, sharing no code with what it checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def is_chunk(span: dict[str, Any]) -> bool:
    """Of a report: a chunk out of the store, or a new one that was computed alone."""
    return span["source"] == "reused" or "alone" in span


class NaiveReuse:
    """Chunks computed after the sink alone, keys turned to their place, laid side by side; the rest computed over them
    in order. The tiny models' sink is their beginning-of-text token.
    """

    def __init__(self, model: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.sink = torch.tensor([[self.tokenizer.bos_token_id]])

    @torch.inference_mode()
    def generate(self, prompt: str, spans: list[dict[str, Any]], num_tokens: int) -> list[int]:
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        cache = DynamicCache()
        logits = torch.empty(0)
        for span in spans:
            piece = ids[:, span["start"] : span["end"]]
            if is_chunk(span):
                self._append_alone(cache, piece, span["start"])
            else:
                logits = self._forward(cache, piece, span["start"])
        tokens = [int(logits.argmax())]
        while len(tokens) < num_tokens:
            logits = self._forward(cache, torch.tensor([tokens[-1:]]), ids.shape[1] + len(tokens) - 1)
            tokens.append(int(logits.argmax()))
        return tokens

    def _forward(self, cache: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
        positions = torch.arange(start, start + ids.shape[1])[None]
        output = self.model(ids, past_key_values=cache, position_ids=positions, use_cache=True)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _append_alone(self, cache: Any, ids: torch.Tensor, start: int) -> None:
        """Computed at its positions in the prompt with only the sink before it: RoPE makes that the moved KV."""
        alone = DynamicCache()
        num_before = self.sink.shape[1]
        positions = torch.arange(start - num_before, start + ids.shape[1])[None]
        mask = torch.ones(1, positions.shape[1], dtype=torch.long)
        text = torch.cat([self.sink, ids], dim=1)
        self.model(text, past_key_values=alone, position_ids=positions, attention_mask=mask, use_cache=True)
        for layer, entry in enumerate(alone.layers):
            cache.update(entry.keys[:, :, num_before:], entry.values[:, :, num_before:], layer)


class CacheBlend(NaiveReuse):
    """arXiv 2405.16444: full layers below the check layer, then only the tokens whose keys deviate most, over the
    naive KV. What no chunk covers goes through all layers."""

    def __init__(self, model: str, ratios: dict[int, float], deviation: str = "keys") -> None:
        """`ratios`: what of the reused tokens goes on, by layer."""
        super().__init__(model)
        self.ratios = ratios
        self.deviation = deviation
        self.num_selected = 0

    @torch.inference_mode()
    def generate(self, prompt: str, spans: list[dict[str, Any]], num_tokens: int) -> list[int]:
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        reused = [span for span in spans if is_chunk(span)]
        end = reused[-1]["end"]
        cache = self.blended_kv(ids[:, :end], reused)
        logits = self._forward(cache, ids[:, end:], end)
        tokens = [int(logits.argmax())]
        while len(tokens) < num_tokens:
            logits = self._forward(cache, torch.tensor([tokens[-1:]]), ids.shape[1] + len(tokens) - 1)
            tokens.append(int(logits.argmax()))
        return tokens

    @torch.inference_mode()
    def blended_kv(self, ids: torch.Tensor, reused: list[dict[str, Any]]) -> Any:
        """The cache of `ids` `(1, T)`, after whose last token no span ends."""
        return self._recomputed(ids, reused, torch.arange(ids.shape[1]))

    @torch.inference_mode()
    def kv_with_chosen(self, ids: torch.Tensor, reused: list[dict[str, Any]], chosen: torch.Tensor) -> Any:
        """The same where these reused positions are recomputed from the first layer on."""
        _, _, is_reused = self._naive_kv(ids, reused)
        return self._recomputed(ids, reused, torch.cat([chosen, (~is_reused).nonzero().flatten()]).sort().values)

    def _recomputed(self, ids: torch.Tensor, reused: list[dict[str, Any]], positions: torch.Tensor) -> Any:
        naive_keys, naive_values, is_reused = self._naive_kv(ids, reused)
        hidden = self.model.model.embed_tokens(ids)[:, positions]
        cache = DynamicCache()
        for number, layer in enumerate(self.model.model.layers):
            query, key, value = self._qkv(layer, hidden, positions)
            if number in self.ratios:
                fresh, naive = (key, naive_keys) if self.deviation == "keys" else (value, naive_values)
                deviation = (fresh[0] - naive[number][0][:, positions]).square().sum(dim=(0, 2))
                deviation[~is_reused[positions]] = math.inf
                self.num_selected = math.ceil(self.ratios[number] * int(is_reused.sum()))
                count = self.num_selected + int((~is_reused).sum())
                rows = deviation.topk(count).indices.sort().values
                positions = positions[rows]
                hidden, query, key, value = hidden[:, rows], *(x[:, :, rows] for x in (query, key, value))
            keys, values = naive_keys[number].clone(), naive_values[number].clone()
            keys[:, :, positions], values[:, :, positions] = key, value
            cache.update(keys, values, number)
            hidden = self._attend(layer, hidden, query, keys, values, positions)
        return cache

    def _naive_kv(self, ids: torch.Tensor, reused: list[dict[str, Any]]) -> tuple[Any, Any, torch.Tensor]:
        layers, config = len(self.model.model.layers), self.model.config
        shape = (1, config.num_key_value_heads, ids.shape[1], config.head_dim)
        keys, values = ([torch.zeros(shape) for _ in range(layers)] for _ in range(2))
        is_reused = torch.zeros(ids.shape[1], dtype=torch.bool)
        for span in reused:
            alone = DynamicCache()
            self._append_alone(alone, ids[:, span["start"] : span["end"]], span["start"])
            is_reused[span["start"] : span["end"]] = True
            for number, entry in enumerate(alone.layers):
                keys[number][:, :, span["start"] : span["end"]] = entry.keys
                values[number][:, :, span["start"] : span["end"]] = entry.values
        return keys, values, is_reused

    def _qkv(self, layer: Any, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        heads = (1, hidden.shape[1], -1, self.model.config.head_dim)
        query, key, value = (projection(normed).view(heads) for projection in projections)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        cos, sin = self.model.model.rotary_emb(hidden, positions[None])
        return (*apply_rotary_pos_emb(query, key, cos, sin), value)

    def _attend(
        self,
        layer: Any,
        hidden: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        mask = torch.arange(keys.shape[2])[None] <= positions[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask[None, None], enable_gqa=True)
        hidden = hidden + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
        output: torch.Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return output
