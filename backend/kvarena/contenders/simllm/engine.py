"""The Sim-LLM engine: reuse between similar tasks, readable from top to bottom in `SimLLMGeneration._steps`.

What it is not: a batching server. Requests take turns with the model; batches are `SimLLMInference.batch_generate`'s.
`TaskPrefiller` is one prompt's prefill with reuse, for callers that draw the answer's tokens themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from kvarena.contenders.simllm.aligned import AlignedReuse
from kvarena.contenders.simllm.inference import SimLLMInference
from kvarena.contenders.simllm.manager import TaskMatch, TaskSearch, if_possible
from kvarena.contenders.simllm.modeling import TaskKV
from kvarena.contenders.simllm.params import WARNINGS, Mode
from kvarena.contenders.simllm.task import TaskOutcome
from kvarena.core.plan import TokenIds, as_token_ids
from kvarena.engines.base import (
    GeneratedToken,
    GenerationRequest,
    Tokenizer,
    num_tokens_to_generate,
    spans_of,
    token_ids_of,
)
from kvarena.engines.hf.model import FIRST_CAPACITY_TOKENS, EngineGeneration, HFModel, Timings, UnsupportedModel
from kvarena.engines.sampling import Sampler
from kvarena.engines.store_metrics import StoreFigures

logger = logging.getLogger(__name__)

NUM_FIRST_TOKENS = 200
NUM_LAST_TOKENS = 150
MIN_ANSWER_TOKENS = 256
Similarity = Annotated[float, Field(strict=True, ge=-1, le=1, allow_inf_nan=False)]


class SimLLMOptions(BaseModel):
    """`reuse` false neither searches for a similar task nor keeps this one. None is the server's own setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reuse: StrictBool = True
    mode: Mode | None = None
    similarity_threshold: Similarity | None = None


def excerpt(token_ids: TokenIds, tokenizer: Tokenizer) -> str:
    """The text of these tokens; of a long one the beginning and the end, and how many tokens stand between."""
    num_between = len(token_ids) - NUM_FIRST_TOKENS - NUM_LAST_TOKENS
    if num_between <= 0:
        return tokenizer.decode(token_ids.tolist())
    first, last = token_ids[:NUM_FIRST_TOKENS].tolist(), token_ids[-NUM_LAST_TOKENS:].tolist()
    return f"{tokenizer.decode(first)}\n[... {num_between:,} tokens ...]\n{tokenizer.decode(last)}"


@dataclass(frozen=True)
class TaskPrefill:
    """`kv` is filled with the whole prompt, and `HFModel.decode` goes on from it; `logits` `(V,)` are those after
    the prompt's last token. `num_positions` are taken in the context, by the earlier prompt too but in mode "aligned".
    """

    kv: Any
    logits: torch.Tensor
    outcome: TaskOutcome
    num_positions: int


@dataclass(frozen=True)
class TaskPrefiller:
    """Over a `LlamaForCausalLMWithKVReuse` that has its manager. Without `aligned` a hit runs `num_end_layers`.

    What is computed goes in pieces, so that other requests' tokens go in between.
    """

    model: HFModel
    aligned: AlignedReuse | None
    num_end_layers: tuple[int, int] = (0, 1)

    def prefill(
        self,
        token_ids: Sequence[int],
        task_id: str,
        max_new_tokens: int,
        *,
        salt: str = "",
        similarity_threshold: float | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> TaskPrefill:
        """Searches, reuses, and keeps what is exact. A task is used that leaves room for `max_new_tokens`.

        `similarity_threshold` None is the manager's own. Raises `Cancelled` when it was given up or the model closed.
        """
        if self.aligned is not None:
            capacity = len(token_ids) + FIRST_CAPACITY_TOKENS
            task = self.model.run(self.aligned.begin, token_ids, task_id, capacity, salt, similarity_threshold)
            filled = task.kv or self.model.new_kv(capacity)
            logits = self.model.prefill(filled, token_ids[filled.length :], is_cancelled)
            outcome = self.model.run(self.aligned.outcome_of, task, logits)
            self.model.run(self.aligned.keep, task, filled.filled(0, len(token_ids)), salt)
            return TaskPrefill(filled, logits, outcome, len(token_ids))
        kv = TaskKV(
            self.model.module.config,
            [task_id],
            max_new_tokens=max_new_tokens,
            salt=salt,
            similarity_threshold=similarity_threshold,
            num_end_layers=self.num_end_layers,
        )
        search = self.model.run(self._search, token_ids, kv)
        if search.match is not None:
            output = self.model.run(self.model.forward, token_ids, past_key_values=kv, use_cache=True)
            return TaskPrefill(kv, output.logits[0, -1], kv.outcomes[0], int(kv.offsets) + len(token_ids))
        computed = self.prefill_without_reuse(token_ids, task_id, is_cancelled)
        self.model.run(self._keep, token_ids, search.embedding, computed, salt)
        return self.model.run(self._checked, kv, token_ids, search.check, computed) if search.check else computed

    def prefill_without_reuse(
        self, token_ids: Sequence[int], task_id: str, is_cancelled: Callable[[], bool] = lambda: False
    ) -> TaskPrefill:
        kv = self.model.new_kv(len(token_ids) + FIRST_CAPACITY_TOKENS)
        logits = self.model.prefill(kv, token_ids, is_cancelled)
        num_passes = len(token_ids) * self.model.kv_shape.num_layers
        return TaskPrefill(kv, logits, TaskOutcome(task_id, len(token_ids), num_passes), len(token_ids))

    def _search(self, token_ids: Sequence[int], kv: TaskKV) -> TaskSearch:
        (search,) = kv.searches = [self.model.module.model.search_task(self._tensor(token_ids), kv)]
        return search

    def _keep(self, token_ids: Sequence[int], embedding: torch.Tensor, computed: TaskPrefill, salt: str) -> None:
        task_id, manager = computed.outcome.task_id, self.model.module.model.manager
        keys, values = computed.kv.filled(0, len(token_ids))[-1][:, None]  # (1, H_kv, T, D) each
        with if_possible(task_id):
            manager.add_task(task_id, embedding, (keys, values), salt=salt, token_ids=as_token_ids(token_ids))

    def _checked(self, kv: TaskKV, token_ids: Sequence[int], match: TaskMatch, computed: TaskPrefill) -> TaskPrefill:
        ids, logits = self._tensor(token_ids), computed.logits
        return replace(computed, outcome=self.model.module.checked(kv, computed.outcome, match, ids, logits))

    def _tensor(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self.model.kv_shape.device)


class SimLLMEngine:
    """Implements `kvarena.engines.base.Engine`. Tasks of different cache salts share nothing.

    All modes use one collection of tasks. What mode "aligned" keeps of a task serves all; what the others keep, the
    last layer's KV, serves those alone.
    """

    contender = "simllm"
    options_model: type[BaseModel] | None = SimLLMOptions

    def __init__(self, simllm: SimLLMInference, model_name: str) -> None:
        self.simllm = simllm
        self.model = simllm.model
        self.model_name = model_name
        self.max_model_len = simllm.model.max_model_len
        self.tokenizer = simllm.model.tokenizer
        self.prefillers = _prefillers(simllm)

    def generate(self, request: GenerationRequest) -> SimLLMGeneration:
        return SimLLMGeneration(self, request)

    def describe(self) -> dict[str, Any]:
        settings = asdict(self.simllm.params)
        defaults = SimLLMOptions().model_dump() | {key: settings[key] for key in ("mode", "similarity_threshold")}
        modes = sorted(self.prefillers)
        return {"contender": self.contender, "modes": modes, "defaults": defaults, **settings}

    def store_figures(self) -> StoreFigures:
        stats = self.simllm.manager.get_statistics()
        return StoreFigures(
            stats["num_hits"],
            stats["num_misses"],
            stats["num_evictions"],
            stats["cache_size"],
            num_bytes=stats["num_bytes"],
            num_errors=stats.get("num_store_errors", 0),
        )

    def close(self) -> None:
        self.simllm.close()


class SimLLMGeneration(EngineGeneration):
    """One request with reuse between tasks. Raises `ValueError` for a mode that this engine doesn't offer."""

    def __init__(self, engine: SimLLMEngine, request: GenerationRequest) -> None:
        super().__init__(engine.model, request, Timings())
        self._manager = engine.simllm.manager
        self._options = request.options if isinstance(request.options, SimLLMOptions) else SimLLMOptions()
        self._own_mode = engine.simllm.params.mode
        self._mode = self._options.mode or self._own_mode
        if self._mode not in engine.prefillers:
            raise ValueError(f"mode must be one of {', '.join(engine.prefillers)} with this model, not {self._mode!r}")
        self._prefiller = engine.prefillers[self._mode]

    def _steps(self) -> Iterator[GeneratedToken]:
        """The request from its text to its last token."""
        model, sampling, timed = self._model, self._request.sampling, self.timings.timed

        # 1. Tokenise.
        with timed("first_token_ms"):
            with timed("tokenize_ms"):
                prompt = self.prompt_token_ids = token_ids_of(self._request, model)
                max_tokens = num_tokens_to_generate(len(prompt), sampling.max_tokens, model)
                sampler = Sampler(sampling, model.kv_shape.device)

            # 2. Search a similar task; prefill over its KV on a hit, in full on a miss; keep what is exact.
            with timed("prefill_ms"):
                prefill = self._prefill(prompt, max_tokens)
                max_tokens = min(max_tokens, model.max_model_len - prefill.num_positions)
            self._report(prefill.outcome)

            # 3. Draw from the logits.
            token = model.run(sampler.draw, prefill.logits)

        # 4. Stream, and decode.
        num_drawn = 0
        while True:
            yield self._drawn(token)
            if self.finish_reason == "stop":
                break
            num_drawn += 1
            if num_drawn == max_tokens:
                self.finish_reason = "length"
                break
            if self._closed.is_set():
                break
            with timed("decode_ms"):
                logits = model.decode(prefill.kv, token.token_id)
                token = model.run(sampler.draw, logits)

    def _prefill(self, prompt: list[int], max_tokens: int) -> TaskPrefill:
        """A client that leaves the length of the answer open gets less of it after an earlier prompt."""
        salt, is_cancelled = self._request.cache_salt, self._closed.is_set
        task_id = self._manager.generate_task_id(",".join(map(str, prompt)), salt)
        threshold = self._similarity_threshold()
        current = self._manager.similarity_threshold if threshold is None else threshold
        self.report.details |= {"mode": self._mode, "similarity_threshold": current}
        if not self._options.reuse:
            return self._prefiller.prefill_without_reuse(prompt, task_id, is_cancelled)
        room = min(max_tokens, MIN_ANSWER_TOKENS) if self._request.sampling.max_tokens is None else max_tokens
        return self._prefiller.prefill(
            prompt, task_id, room, salt=salt, similarity_threshold=threshold, is_cancelled=is_cancelled
        )

    def _similarity_threshold(self) -> float | None:
        """None leaves it to the manager, which may learn from what it finds: of the engine's own mode only."""
        chosen = self._options.similarity_threshold
        if chosen is not None or self._mode == self._own_mode:
            return chosen
        current = self._manager.similarity_threshold
        return 1.0 if current is None else current

    def _report(self, outcome: TaskOutcome) -> None:
        earlier = outcome.matched_token_ids
        self.report.approximate = outcome.is_approximate
        self.report.num_prompt_tokens = outcome.num_prompt_tokens
        self.report.num_reused_tokens = outcome.num_reused_tokens
        self.report.num_recomputed_tokens = outcome.num_recomputed_tokens
        self.report.num_computed_tokens = outcome.num_computed_tokens
        self.report.details |= {
            "reuse_enabled": self._options.reuse,
            "hit": outcome.is_hit,
            "similarity": outcome.similarity,
            "task_id": outcome.task_id,
            "matched_task_id": outcome.matched_task_id,
            "num_matched_prompt_tokens": None if earlier is None else len(earlier),
            "warning": WARNINGS.get(self._mode) if outcome.is_hit else None,
            "check": asdict(outcome.check) if outcome.check else None,
            "num_layer_passes": outcome.num_layer_passes,
            "num_layer_passes_without_reuse": outcome.num_prompt_tokens * self._model.kv_shape.num_layers,
            "spans": spans_of(((*span, "reused") for span in outcome.spans), outcome.num_prompt_tokens),
        }
        if earlier is not None and not self._request.cache_salt:  # reports are found by id, whatever one's own salt is
            self.report.texts["matched_prompt"] = excerpt(earlier, self._model.tokenizer)


def _prefillers(simllm: SimLLMInference) -> Mapping[str, TaskPrefiller]:
    """One for each mode; a model whose keys can't be moved has no "aligned"."""
    prefillers = {
        mode: TaskPrefiller(simllm.model, None, simllm.params.end_layers_of(mode)) for mode in ("top_layer", "sandwich")
    }
    try:
        aligned = simllm.aligned or AlignedReuse(simllm.model, simllm.manager, simllm.params.aligned)
    except UnsupportedModel as error:
        logger.warning("mode aligned is not offered: %s", error)
        return prefillers
    return prefillers | {"aligned": TaskPrefiller(simllm.model, aligned)}
