"""A prefix engine beside Hugging Face's own `generate` on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kvarena.contenders.prefix.engine import PrefixEngine, PrefixGeneration, PrefixOptions
from kvarena.engines.base import GeneratedToken, GenerationRequest, Report, Sampling
from kvarena.engines.hf.model import HFModel

GREEDY = Sampling(max_tokens=12, temperature=0.0)


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    tokens: list[GeneratedToken]
    report: Report
    finish_reason: str | None

    @property
    def timings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.report.details["timings"]
        return found


@dataclass
class Prefix:
    """An engine, and the same weights as Hugging Face serves them."""

    engine: PrefixEngine
    reference: Any

    def ask(self, prompt: str | Sequence[int], sampling: Sampling = GREEDY, salt: str = "", **options: bool) -> Answer:
        """Without the end-of-sequence token, as `generate`."""
        generation = self.start(prompt, sampling, salt, **options)
        tokens = [token for token in generation if not token.is_end]
        return Answer([t.token_id for t in tokens], tokens, generation.report, generation.finish_reason)

    def start(
        self, prompt: str | Sequence[int], sampling: Sampling = GREEDY, salt: str = "", **options: bool
    ) -> PrefixGeneration:
        ids = prompt if isinstance(prompt, str) else tuple(prompt)
        return self.engine.generate(
            GenerationRequest("test", ids, sampling, cache_salt=salt, options=PrefixOptions(**options))
        )

    def generate(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> list[int]:
        """Hugging Face's answer, without the end-of-sequence token."""
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        ids = torch.tensor([list(prompt)])
        output = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=sampling.max_tokens, **drawn
        )
        answer: list[int] = output[0, len(prompt) :].tolist()
        eos = self.engine.model.eos_token_ids
        return answer[:-1] if answer and answer[-1] in eos else answer


def make_prefix(folder: Path, cache_bytes: int = 1 << 28, max_model_len: int | None = None, **settings: Any) -> Prefix:
    model = HFModel.load(str(folder), device="cpu", dtype="float32", max_model_len=max_model_len)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Prefix(PrefixEngine(model, folder.name, cache_bytes=cache_bytes, **settings), reference)
