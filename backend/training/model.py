"""A small Llama for training, with the parameter names of Hugging Face's: its state dict is the exported model's.

A row is a context followed by branches: questions that all see the context and not each other, so that one context
pays for many questions and each is asked as it will be, right after the notes.

Shapes: B rows, T tokens of a row, C of them context, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

WRITTEN_OUT_UP_TO = 900


@dataclass(frozen=True)
class ModelConfig:
    """Under the names of `transformers.LlamaConfig`."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 320
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], branch_mask: Tensor, context_mask: Tensor | None
    ) -> Tensor:
        num_rows, length, _ = x.shape
        q = self.q_proj(x).view(num_rows, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(num_rows, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(num_rows, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        end = length - branch_mask.shape[2]
        context = _attend(q[:, :, :end], k[:, :, :end], v[:, :, :end], context_mask)
        y = torch.cat((context, _attend(q[:, :, end:], k, v, branch_mask)), 2)
        output: Tensor = self.o_proj(y.transpose(1, 2).reshape(num_rows, length, -1))
        return output


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], branch_mask: Tensor, context_mask: Tensor | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, branch_mask, context_mask)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


class SmallLlama(nn.Module):
    _frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.register_buffer("_frequencies", rope_frequencies(config), persistent=False)

    def forward(
        self, ids: Tensor, positions: Tensor, branch_mask: Tensor, context_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, T, hidden).

        `branch_mask` (B, 1, T - C, T) is what the branches' tokens see, `context_mask` (B, 1, C, C) what the
        context's do; without it, what is before them.
        """
        angles = positions[:, None, :, None] * self._frequencies  # (B, 1, T, D / 2)
        angles = torch.cat((angles, angles), -1)
        x: Tensor = self.model.embed_tokens(ids)
        rotation = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.model.layers:
            x = layer(x, rotation, branch_mask, context_mask)
        hidden: Tensor = self.model.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.model.embed_tokens.weight.T.to(hidden.dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies: Tensor = config.rope_theta**-exponents
    return frequencies


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, H, T, D) over (B, H_kv, S, D); without a mask it is causal.

    Written out where it is short: on CPUs two matrix products take half the time of the fused kernel there.
    """
    num_rows, num_heads, length, size = q.shape
    num_groups, num_keys = k.shape[1:3]
    per_group = num_heads // num_groups
    if q.is_cuda or num_keys > WRITTEN_OUT_UP_TO:
        k, v = k.repeat_interleave(per_group, 1), v.repeat_interleave(per_group, 1)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    queries = q.reshape(num_rows, num_groups, per_group * length, size)
    scores = (queries @ k.mT * size**-0.5).view(num_rows, num_groups, per_group, length, num_keys)
    weights = scores.masked_fill(~mask[:, :, None] if mask.dim() == 4 else ~mask, -1e30).softmax(-1)
    attended: Tensor = weights.view(num_rows, num_groups, per_group * length, num_keys) @ v
    return attended.view(q.shape)
