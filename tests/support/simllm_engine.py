"""A Sim-LLM engine over a tiny Llama, beside the library and Hugging Face on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarena.contenders.simllm.engine import SimLLMEngine, SimLLMOptions
from kvarena.contenders.simllm.params import SimilarityThreshold
from kvarena.engines.base import GenerationRequest, Report, Sampling
from kvarena.engines.hf import attention
from support.simllm_tasks import NUM_TOKENS, Tasks

GREEDY = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


@dataclass
class Served:
    tasks: Tasks
    engine: SimLLMEngine

    def ask(
        self, prompt: str | Sequence[int], sampling: Sampling = GREEDY, salt: str = "", **options: Any
    ) -> tuple[tuple[int, ...], Report]:
        ids = prompt if isinstance(prompt, str) else tuple(prompt)
        request = GenerationRequest("test", ids, sampling, cache_salt=salt, options=SimLLMOptions(**options))
        generation = self.engine.generate(request)
        tokens = tuple(token.token_id for token in generation if not token.is_end)
        report = generation.report
        assert report.num_prompt_tokens == len(generation.prompt_token_ids)
        assert sum(span["end"] - span["start"] for span in report.details["spans"]) == report.num_prompt_tokens
        assert {"prefill_ms", "first_token_ms", "decode_ms", "total_ms"} <= report.details["timings"].keys()
        return tokens, report


def served(folder: Path, mode: str, threshold: SimilarityThreshold = 0.95) -> Served:
    tasks = Tasks.load(folder, mode=mode, similarity_threshold=threshold, attn_implementation=attention.NAME)
    return Served(tasks, SimLLMEngine(tasks.simllm, "tiny"))
