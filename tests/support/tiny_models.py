"""Small real models, made from a config with random weights, with a real byte-level BPE tokenizer."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WORDS = [
    "tea",
    "rain",
    "hill",
    "goat",
    "blue",
    "river",
    "stone",
    "seven",
    "market",
    "lamp",
    "road",
    "bread",
    "under",
    "morning",
    "old",
    "paper",
    "cat",
    "green",
]
FAMILIES: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4 + ["# Heading\n\n## Part\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def save_tiny_model(
    folder: Path, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Four layers of hidden size 128 with weights large enough for answers that depend on the whole prompt."""
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = SHAPE | {"vocab_size": len(tokenizer), "dtype": dtype}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**(settings | config)))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter for `save_tiny_model`'s attention, with random weights, as PEFT writes it."""
    folder.mkdir(parents=True)
    rank, width, widths = 8, SHAPE["hidden_size"], {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": list(widths), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer, (name, out) in itertools.product(range(SHAPE["num_hidden_layers"]), widths.items()):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        weights[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(rank, width, generator=generator)
        weights[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(out, rank, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def save_model_folders(root: Path) -> dict[str, Path]:
    """One tiny model of each family, by the family's name, and the town model."""
    folders = {family: save_tiny_model(root / family, family) for family in FAMILIES}
    return folders | {"town": Path(__file__).resolve().parents[2] / "backend" / "models" / "town"}


def random_text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))
