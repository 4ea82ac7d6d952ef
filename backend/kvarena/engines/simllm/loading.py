"""A model with inter-task KV reuse as a server wants it: any device, weights or none, and a context that may be cut."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

from kvarena.engines import attention
from kvarena.simllm.device import available_device
from kvarena.simllm.inference import SimLLMInference
from kvarena.simllm.modeling import LlamaForCausalLMWithKVReuse, llama_config
from kvarena.simllm.params import SimLLMParams


def load_simllm(
    path: str,
    params: SimLLMParams,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    random: bool = False,
) -> SimLLMInference:
    """With `load_module`. Raises `ValueError` also for a model that mode "aligned" can't serve, or whose context
    is shorter than `max_model_len`.
    """
    config: Any = llama_config(path)
    if max_model_len is not None and not 1 <= max_model_len <= config.max_position_embeddings:
        raise ValueError(
            f"max_model_len is {max_model_len}; this model's contexts have 1 to {config.max_position_embeddings} tokens"
        )
    module = load_module(path, device=device, dtype=dtype, random=random)
    if max_model_len is not None:
        module.config.max_position_embeddings = max_model_len  # what the rotary embedding took from it is as it was
    return SimLLMInference(module, AutoTokenizer.from_pretrained(path), params)


def load_module(path: str, *, device: str = "auto", dtype: str = "auto", random: bool = False) -> Any:
    """A `LlamaForCausalLMWithKVReuse` from a local folder or a hub name; `dtype` "auto" is the checkpoint's.

    `random` makes the weights up from the config: any shape, no download. Raises `OSError` when there is no such model,
    and `ValueError` for one that isn't a Llama.
    """
    config = llama_config(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind: Any = LlamaForCausalLMWithKVReuse
    if random:
        torch_dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
        module = kind._from_config(config, dtype=torch_dtype, attn_implementation=attention.NAME)
    else:
        module = kind.from_pretrained(path, dtype=dtype, attn_implementation=attention.NAME)
    return module.to(available_device(device)).eval()
