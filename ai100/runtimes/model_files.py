"""What a runtime has to know of a model beside its weights, read from the model's folder or its hub repository."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ai100.runtimes.runtime import StaticShapes
from kvarena.engines.base import Tokenizer

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelFiles:
    """`path` is a local folder or a hub name."""

    path: str
    config: Any
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]

    @classmethod
    def read(cls, path: str) -> ModelFiles:
        """Raises `OSError` when there is no such model."""
        config = AutoConfig.from_pretrained(path)
        return cls(path, config, AutoTokenizer.from_pretrained(path), _eos_token_ids(path, config))

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    def check(self, shapes: StaticShapes) -> None:
        """Raises `ValueError` when slots of this length can't hold the model's KV exactly."""
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest and shapes.ctx_len > longest:
            raise ValueError(f"ctx_len {shapes.ctx_len} is more than the {longest} positions of {self.path}")
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or ["sliding_attention"]
        if window and "sliding_attention" in kinds and window < shapes.ctx_len:
            raise ValueError(f"ctx_len {shapes.ctx_len} is more than the sliding window of {window} tokens")
        rope = str((getattr(self.config, "rope_parameters", None) or {}).get("rope_type", "default"))
        if rope in LENGTH_DEPENDENT_ROPE:
            raise ValueError(f"rope_type {rope!r}: frequencies that depend on the length don't fit kept keys")


def kv_shape(config: Any) -> tuple[int, int, int]:
    """Layers, KV heads and head size of a model whose layers are alike. Raises `ValueError` for any other."""
    try:
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, config.num_key_value_heads, head_size
    except AttributeError as error:
        raise ValueError(f"a {config.model_type} doesn't run over KV slots: {error}") from error


def _eos_token_ids(path: str, config: Any) -> frozenset[int]:
    try:
        found = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without generation_config.json
        found = None
    if found is None:
        found = config.eos_token_id
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)
