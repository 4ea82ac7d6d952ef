"""A tiny Llama with inter-task KV reuse beside the same weights in stock Hugging Face."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from kvarena.simllm import SimLLMInference, TaskAnswer
from support.tiny_models import random_text

NUM_TOKENS = 12
AT_LENGTH: dict[str, Any] = {"min_new_tokens": NUM_TOKENS}


def prompt_of(seed: int, num_words: int = 40) -> str:
    return random_text(random.Random(seed), num_words)


@dataclass
class Tasks:
    simllm: SimLLMInference
    reference: Any

    @classmethod
    def load(cls, folder: Path, **settings: Any) -> Tasks:
        simllm = SimLLMInference.from_pretrained(str(folder), device="cpu", **settings)
        return cls(simllm, LlamaForCausalLM.from_pretrained(folder).eval())

    def encode(self, prompt: str) -> list[int]:
        return self.simllm.model.tokenizer.encode(prompt)

    def ask(self, *prompts: str, reuse: bool = True, **settings: Any) -> list[TaskAnswer]:
        """Greedy answers of `NUM_TOKENS`; the counts of each are checked."""
        answers = self.simllm.answer(prompts, NUM_TOKENS, reuse, **(AT_LENGTH | settings))
        for answer, prompt in zip(answers, prompts, strict=True):
            outcome = answer.outcome
            assert outcome.num_prompt_tokens == len(self.encode(prompt))
            assert min(outcome.num_reused_tokens, outcome.num_recomputed_tokens, outcome.num_computed_tokens) >= 0
            assert len(answer.token_ids) == NUM_TOKENS
        self.simllm.manager.check_integrity()
        return answers

    def generate(self, prompt: str) -> tuple[int, ...]:
        """Hugging Face's own greedy answer."""
        ids = torch.tensor([self.encode(prompt)])
        output = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS, **AT_LENGTH
        )
        return tuple(output[0, ids.shape[1] :].tolist())

    @contextmanager
    def counted(self, num_columns: int) -> Iterator[list[int]]:
        """How many tokens each layer's attention ran over in forwards of more than one token; padding counts."""
        layers = self.simllm.model.module.model.layers
        counts = [0] * len(layers)

        def count(number: int) -> Any:
            def hook(_module: torch.nn.Module, _args: Sequence[Any], kwargs: dict[str, Any]) -> None:
                rows, columns = kwargs["hidden_states"].shape[:2]
                counts[number] += rows * columns if columns == num_columns else 0

            return hook

        handles = [
            layer.self_attn.register_forward_pre_hook(count(n), with_kwargs=True) for n, layer in enumerate(layers)
        ]
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()
