"""A Llama's layers in plain torch operations on its weights, and over them a hit in mode "top_layer" or "sandwich"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import silu


@dataclass
class LayerKV:
    """Keys and values of one layer, each `(T, H_kv, D)`."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


class PlainLlama:
    """One token at a time, so that what it attends to is what a list holds."""

    def __init__(self, model: Any) -> None:
        state: dict[str, torch.Tensor] = model.state_dict()
        self.weights = {name: weight.detach().double() for name, weight in state.items()}
        config = model.config
        self.num_layers = config.num_hidden_layers
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.eps = config.rms_norm_eps
        self.theta = config.rope_parameters["rope_theta"]

    def new_kv(self) -> list[LayerKV]:
        return [LayerKV() for _ in range(self.num_layers)]

    def step(self, token: int, position: int, kv: list[LayerKV], layers: Sequence[int]) -> torch.Tensor:
        """A token through these layers, from its input embedding; the logits `(V,)` after the last of them."""
        hidden = self.weights["model.embed_tokens.weight"][token]
        for layer in layers:
            hidden = self._layer(layer, hidden, position, kv[layer])
        normed = self._norm(hidden, "model.norm.weight")
        return self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"]) @ normed

    def answer_of_a_hit(
        self, earlier: list[int], prompt: list[int], num_tokens: int, num_end_layers: tuple[int, int] = (0, 1)
    ) -> tuple[list[int], torch.Tensor]:
        """The earlier prompt in full; the new one after it in so many of the first and the last layers; the answer
        through all layers, some of which hold nothing but the answer. Greedy tokens, and the logits of each
        `(num_tokens, V)`.
        """
        in_full = self.new_kv()
        for position, token in enumerate(earlier):
            self.step(token, position, in_full, range(self.num_layers))
        kv = self.new_kv()
        kv[-1] = in_full[-1]
        first, last = num_end_layers
        ends = [*range(first), *range(self.num_layers - last, self.num_layers)]
        for number, token in enumerate(prompt):
            logits = self.step(token, len(earlier) + number, kv, ends)
        return self._greedy(logits, len(earlier) + len(prompt), kv, num_tokens)

    def answer(self, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
        kv = self.new_kv()
        for position, token in enumerate(prompt):
            logits = self.step(token, position, kv, range(self.num_layers))
        return self._greedy(logits, len(prompt), kv, num_tokens)

    def _greedy(
        self, logits: torch.Tensor, position: int, kv: list[LayerKV], num_tokens: int
    ) -> tuple[list[int], torch.Tensor]:
        all_logits = [logits]
        while len(all_logits) < num_tokens:
            token = int(all_logits[-1].argmax())
            all_logits.append(self.step(token, position + len(all_logits) - 1, kv, range(self.num_layers)))
        return [int(row.argmax()) for row in all_logits], torch.stack(all_logits)

    def _layer(self, layer: int, hidden: torch.Tensor, position: int, kv: LayerKV) -> torch.Tensor:
        num_heads, num_kv_heads, head_size = self.heads
        name = f"model.layers.{layer}"
        normed = self._norm(hidden, f"{name}.input_layernorm.weight")
        query, key, value = (self.weights[f"{name}.self_attn.{part}_proj.weight"] @ normed for part in "qkv")
        kv.keys.append(self._rotate(key.view(num_kv_heads, head_size), position))
        kv.values.append(value.view(num_kv_heads, head_size))
        query = self._rotate(query.view(num_heads, head_size), position)
        keys, values = (
            torch.stack(part).repeat_interleave(num_heads // num_kv_heads, dim=1) for part in (kv.keys, kv.values)
        )
        scores = torch.einsum("hd,thd->ht", query, keys) / head_size**0.5
        mixed = torch.einsum("ht,thd->hd", scores.softmax(-1), values).flatten()
        hidden = hidden + self.weights[f"{name}.self_attn.o_proj.weight"] @ mixed
        normed = self._norm(hidden, f"{name}.post_attention_layernorm.weight")
        gate, up = (self.weights[f"{name}.mlp.{part}_proj.weight"] @ normed for part in ("gate", "up"))
        return hidden + self.weights[f"{name}.mlp.down_proj.weight"] @ (silu(gate) * up)

    def _norm(self, x: torch.Tensor, weight: str) -> torch.Tensor:
        normed: torch.Tensor = self.weights[weight] * x / (x.square().mean() + self.eps).sqrt()
        return normed

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """RoPE (arXiv 2104.09864) of `(H, D)`, dimension i turning with i + D/2."""
        half = x.shape[-1] // 2
        angle = position * self.theta ** -(torch.arange(half, dtype=torch.float64) / half)
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )
