"""Drawing tokens from logits, with Hugging Face's own warpers: the same seed draws what `generate` draws."""

from __future__ import annotations

import torch
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from kvarena.engines.base import GeneratedToken, Sampling

LEAST_TEMPERATURE = 1e-5
"""Below it draws are greedy, as in vLLM: logits divided by so little exceed fp32."""


class Sampler:
    """Draws one request's tokens, one after the other. Logprobs are those of the model, before any warping."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._num_logprobs = sampling.num_logprobs
        self._is_greedy = sampling.temperature < LEAST_TEMPERATURE
        self._warpers = LogitsProcessorList()
        self._generator = torch.Generator(device)
        if self._is_greedy:
            return
        if sampling.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: torch.Tensor) -> GeneratedToken:
        """A token from logits `(V,)`. Call it in the model's thread."""
        logits = logits.float()
        if self._is_greedy:
            token_id = int(logits.argmax())
        else:
            warped: torch.Tensor = self._warpers(None, logits[None])
            token_id = int(torch.multinomial(warped.softmax(-1), 1, generator=self._generator))
        if self._num_logprobs is None:
            return GeneratedToken(token_id)
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(min(self._num_logprobs, len(logprobs)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return GeneratedToken(token_id, float(logprobs[token_id]), top)
