"""The Sim-LLM engine: reuse between similar tasks, readable from top to bottom in `SimLLMGeneration._steps`.

What it is not: a batching server. Requests take turns with the model; batches are `SimLLMInference.batch_generate`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from pydantic import BaseModel

from kvarena.api.engine import FinishReason, GeneratedToken, GenerationRequest, Report
from kvarena.engines.hf_model import Cancelled
from kvarena.engines.prompt import num_tokens_to_generate, token_ids_of
from kvarena.engines.sampling import Sampler
from kvarena.engines.simllm.options import SimLLMOptions
from kvarena.simllm.inference import SimLLMInference
from kvarena.simllm.outcome import TaskOutcome
from kvarena.simllm.prefill import TaskPrefill, TaskPrefiller

LEAST_ANSWER_TOKENS = 256


@dataclass
class Timings:
    """Milliseconds. `prefill_ms` has search and keeping in it; `first_token_ms` is all until the first token."""

    tokenize_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + (perf_counter() - started) * 1000)


class SimLLMEngine:
    """Implements `kvarena.api.engine.Engine`. Tasks of different cache salts share nothing."""

    contender = "simllm"
    options_model: type[BaseModel] | None = SimLLMOptions

    def __init__(self, simllm: SimLLMInference, model_name: str) -> None:
        self.simllm = simllm
        self.model = simllm.model
        self.model_name = model_name
        self.max_model_len = simllm.model.max_model_len
        self.tokenizer = simllm.model.tokenizer
        self.prefiller = TaskPrefiller(simllm.model, simllm.aligned)

    def generate(self, request: GenerationRequest) -> SimLLMGeneration:
        return SimLLMGeneration(self, request)

    def describe(self) -> dict[str, Any]:
        settings = asdict(self.simllm.params) | {"similarity_threshold": self.simllm.manager.similarity_threshold}
        return {"contender": self.contender, "defaults": SimLLMOptions().model_dump(), **settings}

    def close(self) -> None:
        self.simllm.close()


class SimLLMGeneration:
    """One request. Implements `kvarena.api.engine.Generation`."""

    def __init__(self, engine: SimLLMEngine, request: GenerationRequest) -> None:
        self.report = Report()
        self.finish_reason: FinishReason | None = None
        self.prompt_token_ids: Sequence[int] = ()
        self.timings = Timings()
        self._engine = engine
        self._model = engine.model
        self._request = request
        self._options = request.options if isinstance(request.options, SimLLMOptions) else SimLLMOptions()
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[GeneratedToken]:
        try:
            with self.timings.measure("total_ms"):
                yield from self._steps()
        except Cancelled:
            pass
        finally:
            timings = {name: round(value, 3) for name, value in asdict(self.timings).items()}
            self.report.details |= {"timings": timings}

    def close(self) -> None:
        self._closed.set()

    def _steps(self) -> Iterator[GeneratedToken]:
        """The request from its text to its last token."""
        model, sampling, measure = self._model, self._request.sampling, self.timings.measure

        # 1. Tokenise.
        with measure("first_token_ms"):
            with measure("tokenize_ms"):
                prompt = self.prompt_token_ids = token_ids_of(self._request, model)
                max_tokens = num_tokens_to_generate(len(prompt), sampling.max_tokens, model)
                sampler = Sampler(sampling, model.kv_shape.device)

            # 2. Search a similar task; prefill over its KV on a hit, in full on a miss; keep what is exact.
            with measure("prefill_ms"):
                prefill = self._prefill(prompt, max_tokens)
                max_tokens = min(max_tokens, model.max_model_len - prefill.num_positions)
            self._report(prefill.outcome)

            # 3. Draw from the logits.
            token = model.run(sampler.draw, prefill.logits)

        # 4. Stream, and decode.
        num_drawn = 0
        while not self._ends_with(token):
            yield token
            num_drawn += 1
            if num_drawn == max_tokens:
                self.finish_reason = "length"
                break
            if self._closed.is_set():
                break
            with measure("decode_ms"):
                logits = model.decode(prefill.kv, token.token_id)
                token = model.run(sampler.draw, logits)

    def _prefill(self, prompt: list[int], max_tokens: int) -> TaskPrefill:
        """A client that leaves the length of the answer open gets less of it behind an earlier prompt."""
        manager, salt, prefiller = self._engine.simllm.manager, self._request.cache_salt, self._engine.prefiller
        task_id = manager.generate_task_id(",".join(map(str, prompt)), salt)
        if not self._options.reuse:
            return prefiller.prefill_without_reuse(prompt, task_id, self._closed.is_set)
        room = min(max_tokens, LEAST_ANSWER_TOKENS) if self._request.sampling.max_tokens is None else max_tokens
        return prefiller.prefill(prompt, task_id, room, salt=salt, is_cancelled=self._closed.is_set)

    def _report(self, outcome: TaskOutcome) -> None:
        simllm = self._engine.simllm
        self.report.approximate = outcome.is_approximate
        self.report.num_prompt_tokens = outcome.num_prompt_tokens
        self.report.num_reused_tokens = outcome.num_reused_tokens
        self.report.num_recomputed_tokens = outcome.num_recomputed_tokens
        self.report.num_computed_tokens = outcome.num_computed_tokens
        self.report.details |= {
            "mode": simllm.params.mode,
            "similarity_threshold": simllm.manager.similarity_threshold,
            "reuse_enabled": self._options.reuse,
            "hit": outcome.is_hit,
            "similarity": outcome.similarity,
            "task_id": outcome.task_id,
            "matched_task_id": outcome.matched_task_id,
            "num_layer_passes": outcome.num_layer_passes,
            "num_layer_passes_without_reuse": outcome.num_prompt_tokens * self._model.kv_shape.num_layers,
            "spans": _spans(outcome),
        }

    def _ends_with(self, token: GeneratedToken) -> bool:
        if token.token_id in self._model.eos_token_ids and not self._request.sampling.ignore_eos:
            self.finish_reason = "stop"
        return self.finish_reason == "stop"


def _spans(outcome: TaskOutcome) -> list[dict[str, Any]]:
    """Where the prompt's KV comes from, without empty spans."""
    edges = [0, *(edge for span in outcome.spans for edge in span), outcome.num_prompt_tokens]
    sources = ["computed", "reused"] * len(edges)
    ranges = zip(edges, edges[1:], sources, strict=False)
    return [{"start": start, "end": end, "source": source} for start, end, source in ranges if start < end]
