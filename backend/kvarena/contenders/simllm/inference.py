"""Inter-task KV reuse as one class: prompts in, answers out.

Prompts of different lengths go as one batch, padded on the left, so that their answers begin in the same column.
`model_id` names a model's KV: two processes share tasks only when their weights and number format are the same.
`load_simllm` is for servers: any device, weights or none, and a context that may be cut.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache

from kvarena.contenders.simllm.aligned import AlignedReuse
from kvarena.contenders.simllm.manager import InterTaskKVManager, available_device
from kvarena.contenders.simllm.modeling import (
    LlamaForCausalLMWithKVReuse,
    TaskKV,
    llama_config,
    refuse_repeated_prefill,
)
from kvarena.contenders.simllm.params import (
    MAX_CACHE_BYTES,
    WARNINGS,
    AlignedParams,
    AutoThresholdParams,
    SimilarityThreshold,
    SimLLMParams,
)
from kvarena.contenders.simllm.shared_tasks import SharedTasks, TaskFormat
from kvarena.contenders.simllm.task import TaskOutcome
from kvarena.core.store import ChunkStore
from kvarena.engines.base import Tokenizer
from kvarena.engines.hf.model import HFModel, load_module
from kvarena.policies.params import profiled_params

logger = logging.getLogger(__name__)


def padded_batch(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, `(B, T)`."""
    longest = max(map(len, prompts))
    rows = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def joined_cache(
    model: HFModel, prompts: Sequence[Sequence[int]], known: Sequence[torch.Tensor | None], pad_token_id: int
) -> DynamicCache:
    """One cache of prompts whose KV `(L, 2, H_kv, T, D)` is known, and of the others, which are run as one batch."""
    shape, cache = model.kv_shape, DynamicCache()
    missing = [prompt for prompt, kv in zip(prompts, known, strict=True) if kv is None]
    longest = max(map(len, missing), default=0)
    if longest:
        input_ids, attention_mask = padded_batch(missing, pad_token_id, shape.device)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        model.module.model(input_ids, attention_mask, positions, past_key_values=cache, use_cache=True)
    computed = (
        unpadded_kv(cache, row, longest - len(prompt), longest) if prompt else shape.empty(0)
        for row, prompt in enumerate(missing)
    )
    return _padded_cache([next(computed) if kv is None else kv for kv in known])


def _padded_cache(rows: Sequence[torch.Tensor]) -> DynamicCache:
    """One cache of the KV `(L, 2, H_kv, T, D)` of several sequences; the shorter ones begin with zeros."""
    longest = max(row.shape[3] for row in rows)
    num_layers, _, num_heads, _, head_size = rows[0].shape
    kv = rows[0].new_zeros(num_layers, 2, len(rows), num_heads, longest, head_size)
    for number, row in enumerate(rows):
        kv[:, :, number, :, longest - row.shape[3] :] = row
    return DynamicCache([(layer[0], layer[1]) for layer in kv])


def unpadded_kv(cache: DynamicCache, row: int, start: int, end: int) -> torch.Tensor:
    """The KV `(L, 2, H_kv, end - start, D)` of these columns of one row."""
    return torch.stack(
        [torch.stack([layer.keys[row, :, start:end], layer.values[row, :, start:end]]) for layer in cache.layers]
    )


_NOT_THE_KVS = ("_name_or_path", "transformers_version", "architectures")


def model_id(model: Any) -> str:
    """`TYPE-DIGEST` of a Hugging Face model's configuration and of every weight: where it was loaded from says less.

    The same in every process. It reads all weights once, about a gigabyte in a second.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_THE_KVS}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{model.config.model_type}-{digest.hexdigest()}"


@dataclass(frozen=True)
class TaskAnswer:
    """`token_ids` end before the end-of-sequence token; `text` is without special tokens."""

    text: str
    token_ids: tuple[int, ...]
    outcome: TaskOutcome


class SimLLMInference:
    """A Llama model whose prompts reuse the KV of similar earlier ones. Thread-safe: calls take turns with the model.

    Answers of prompts that miss are Hugging Face's `generate`'s. Raises `ValueError` for an empty prompt, or one that
    has no room in the model's context with `max_new_tokens`.

    >>> simllm = SimLLMInference.from_pretrained("meta-llama/Llama-3.2-1B-Instruct")
    >>> simllm.generate("What is machine learning?")
    >>> simllm.generate("Explain machine learning.")
    >>> simllm.get_statistics()["num_hits"]
    """

    def __init__(
        self, model: LlamaForCausalLMWithKVReuse, tokenizer: Tokenizer, params: SimLLMParams | None = None
    ) -> None:
        self.params = params or SimLLMParams()
        self.manager = InterTaskKVManager(
            model.config.hidden_size,
            self.params.max_cache_size,
            self.params.similarity_threshold,
            self.params.num_hyperplanes,
            str(model.device),
            self.params.auto,
            self.params.max_cache_bytes,
        )
        model.set_kv_manager(self.manager)
        self.model = HFModel(model, tokenizer)
        self.aligned: AlignedReuse | None = None
        if self.params.mode == "aligned":
            self.aligned = AlignedReuse(self.model, self.manager, self.params.aligned)
        if self.params.mode in WARNINGS:
            logger.warning("%s", WARNINGS[self.params.mode])
        self._lock = threading.Lock()
        self._num_prompts = self._num_prompt_tokens = self._num_layer_passes = 0
        self._answering_s = 0.0

    @classmethod
    def from_pretrained(
        cls,
        model_path: str,
        max_cache_size: int = 100,
        similarity_threshold: SimilarityThreshold = 0.8,
        num_hyperplanes: int = 16,
        device: str = "cuda",
        mode: str = "aligned",
        aligned: AlignedParams | None = None,
        auto: AutoThresholdParams | None = None,
        num_end_layers: int = 2,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        **model_kwargs: Any,
    ) -> SimLLMInference:
        """From a local folder or a hub name; `model_kwargs` are those of `LlamaForCausalLM.from_pretrained`.

        Without `aligned` that mode blends as the model's own profile says. Warns and takes the CPU where there is no
        such device. Raises `OSError` when there is no such model, and `ValueError` for one that isn't a Llama.
        """
        llama_config(model_path)
        aligned = aligned or AlignedParams(blend=profiled_params(model_path))
        auto = auto or AutoThresholdParams()
        params = SimLLMParams(
            mode,
            max_cache_size,
            similarity_threshold,
            num_hyperplanes,
            aligned,
            auto,
            num_end_layers,
            max_cache_bytes,
        )
        model = LlamaForCausalLMWithKVReuse.from_pretrained(model_path, **model_kwargs)
        return cls(model.to(available_device(device)), AutoTokenizer.from_pretrained(model_path), params)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        do_sample: bool = False,
        task_id: str | None = None,
        enable_kv_reuse: bool = True,
        **generate_kwargs: Any,
    ) -> str:
        """The answer to one prompt. Greedy, unless `do_sample` says to draw at a `temperature` above 0."""
        drawing: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if do_sample:
            if not temperature > 0 or not 0 < top_p <= 1:
                raise ValueError(
                    f"do_sample needs a temperature above 0 and top_p above 0, at most 1, not {temperature} and {top_p}"
                )
            drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        task_ids = None if task_id is None else [task_id]
        settings = drawing | generate_kwargs
        return self.answer([prompt], max_new_tokens, enable_kv_reuse, task_ids=task_ids, **settings)[0].text

    def batch_generate(
        self, prompts: Sequence[str], max_new_tokens: int = 100, enable_kv_reuse: bool = True, **generate_kwargs: Any
    ) -> list[str]:
        """The greedy answers to several prompts, in one batch; each may hit or miss. Repeated ones follow in a second
        batch, so that they hit the first."""
        return [answer.text for answer in self.answer(prompts, max_new_tokens, enable_kv_reuse, **generate_kwargs)]

    def answer(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 100,
        enable_kv_reuse: bool = True,
        *,
        task_ids: Sequence[str] | None = None,
        **generate_kwargs: Any,
    ) -> list[TaskAnswer]:
        """One batch, and what reuse did for each prompt. `generate_kwargs` are Hugging Face's `generate`'s."""
        if isinstance(prompts, str):
            raise ValueError("prompts must be a sequence of texts, not one text")
        if not prompts:
            return []
        started = time.perf_counter()
        rows = [self._encode(prompt, max_new_tokens) for prompt in prompts]
        ids = list(task_ids) if task_ids else [self.manager.generate_task_id(prompt) for prompt in prompts]
        module = self.model.module
        if enable_kv_reuse:
            refuse_repeated_prefill(generate_kwargs, module.generation_config)
        elif generate_kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences must be 1: a prompt has one answer")
        settings = {"do_sample": False} | generate_kwargs | {"return_dict_in_generate": False}
        settings |= {"max_new_tokens": max_new_tokens, "pad_token_id": self._pad_token_id()}
        run = self._run_without_reuse
        if enable_kv_reuse:
            run = self._run_aligned if self.aligned else self._run_last_layers
        decode = self.model.tokenizer.decode
        answered: dict[int, TaskAnswer] = {}
        for places in _firsts_then_repeats(rows) if enable_kv_reuse else [range(len(rows))]:
            batch = [rows[place] for place in places]
            answers, outcomes = self.model.run(run, batch, [ids[place] for place in places], settings)
            self._count(outcomes)
            for place, answer, outcome in zip(places, answers, outcomes, strict=True):
                text = decode(answer, skip_special_tokens=True)
                answered[place] = TaskAnswer(text, tuple(answer), outcome)
        with self._lock:
            self._answering_s += time.perf_counter() - started
        return [answered[place] for place in range(len(rows))]

    def get_statistics(self) -> dict[str, Any]:
        """The manager's counts, and layer passes over prompt tokens beside those of standard passes.

        The last three have the names of Sim-LLM's demonstration: prompts, and the seconds that calls took.
        """
        with self._lock:
            return self.manager.get_statistics() | {
                "mode": self.params.mode,
                "warning": WARNINGS.get(self.params.mode),
                "num_prompts": self._num_prompts,
                "num_prompt_tokens": self._num_prompt_tokens,
                "num_layer_passes": self._num_layer_passes,
                "num_layer_passes_without_reuse": self._num_prompt_tokens * self.model.kv_shape.num_layers,
                "total_inferences": self._num_prompts,
                "total_inference_time": self._answering_s,
                "avg_inference_time": self._answering_s / self._num_prompts if self._num_prompts else 0.0,
            }

    def reset_cache(self) -> None:
        """Forget all tasks and counts."""
        with self._lock:
            self.manager.reset()
            self._num_prompts = self._num_prompt_tokens = self._num_layer_passes = 0
            self._answering_s = 0.0

    def set_similarity_threshold(self, threshold: SimilarityThreshold) -> None:
        """A cosine similarity, or "auto", which starts with no comparisons. Raises `ValueError` for anything else."""
        self.manager.set_similarity_threshold(threshold)

    @cached_property
    def task_format(self) -> TaskFormat:
        """What tasks of this model are, for a store that is to keep them."""
        shape = self.model.kv_shape
        kept = shape if self.aligned else replace(shape, num_layers=1)
        model = self.model.module
        return TaskFormat(model_id(model), self.params.mode, model.config.hidden_size, kept)

    def share_tasks(self, store: ChunkStore, path: str | Path) -> None:
        """Share tasks, through a store, with whoever names the same file; other models' tasks there don't matter.

        >>> name, kv = simllm.task_format.name, simllm.task_format.kv_shape
        >>> geometry = KVGeometry(name, kv.num_layers, kv.num_kv_heads, kv.head_size, kv.dtype)
        >>> store = LMCacheStore(geometry, "tcp://127.0.0.1:5555", "http://127.0.0.1:8080")
        >>> simllm.share_tasks(store, "tasks.sqlite")
        """
        self.manager.share(SharedTasks(store, path, self.task_format))

    def close(self) -> None:
        self.model.close()

    # -- in the model's thread -------------------------------------------------------------------------------------

    def _run_without_reuse(
        self, rows: list[list[int]], task_ids: list[str], settings: dict[str, Any]
    ) -> tuple[list[list[int]], list[TaskOutcome]]:
        num_layers = self.model.kv_shape.num_layers
        outcomes = [
            TaskOutcome(name, len(row), len(row) * num_layers) for name, row in zip(task_ids, rows, strict=True)
        ]
        return self._generate(rows, settings, None), outcomes

    def _run_last_layers(
        self, rows: list[list[int]], task_ids: list[str], settings: dict[str, Any]
    ) -> tuple[list[list[int]], list[TaskOutcome]]:
        kv = TaskKV(
            self.model.module.config,
            task_ids,
            max_new_tokens=settings["max_new_tokens"],
            num_end_layers=self.params.end_layers_of(self.params.mode),
        )
        return self._generate(rows, settings, kv), kv.outcomes

    def _run_aligned(
        self, rows: list[list[int]], task_ids: list[str], settings: dict[str, Any]
    ) -> tuple[list[list[int]], list[TaskOutcome]]:
        assert self.aligned, "the mode is aligned"
        begin, longest = self.aligned.begin, max(map(len, rows))
        tasks = [begin(row, task_id, longest) for row, task_id in zip(rows, task_ids, strict=True)]
        cache = DynamicCache()
        if any(task.kv for task in tasks):
            known = [task.kv and task.kv.filled(0, task.kv.length) for task in tasks]
            cache = joined_cache(self.model, [row[:-1] for row in rows], known, self._pad_token_id())
        with first_logits(self.model.module.lm_head) as logits:
            answers = self._generate(rows, settings, cache)
        for number, (task, row) in enumerate(zip(tasks, rows, strict=True)):
            if task.is_worth_keeping:
                self.aligned.keep(task, unpadded_kv(cache, number, longest - len(row), longest))
        outcome_of = self.aligned.outcome_of
        return answers, [outcome_of(task, row_logits) for task, row_logits in zip(tasks, logits[0][:, -1], strict=True)]

    def _generate(self, rows: list[list[int]], settings: dict[str, Any], cache: Cache | None) -> list[list[int]]:
        input_ids, mask = padded_batch(rows, self._pad_token_id(), self.model.kv_shape.device)
        output = self.model.module.generate(input_ids, attention_mask=mask, past_key_values=cache, **settings)
        answers: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
        eos_token_ids = self.model.eos_token_ids
        return [list(takewhile(lambda token: token not in eos_token_ids, answer)) for answer in answers]

    # -- in the caller's thread ------------------------------------------------------------------------------------

    def _encode(self, prompt: str, max_new_tokens: int) -> list[int]:
        row = self.model.tokenizer.encode(prompt) if prompt else []
        if not row:
            raise ValueError(f"a prompt must be a text of at least one token, not {prompt!r}")
        if len(row) + max_new_tokens > self.model.max_model_len:
            raise ValueError(
                f"the prompt has {len(row)} tokens and max_new_tokens is {max_new_tokens}; together they exceed the "
                f"context of {self.model.max_model_len} tokens"
            )
        return row

    def _pad_token_id(self) -> int:
        pad = getattr(self.model.tokenizer, "pad_token_id", None)
        return int(pad if pad is not None else self.model.tokenizer.eos_token_id or 0)

    def _count(self, outcomes: list[TaskOutcome]) -> None:
        with self._lock:
            self._num_prompts += len(outcomes)
            self._num_prompt_tokens += sum(outcome.num_prompt_tokens for outcome in outcomes)
            self._num_layer_passes += sum(outcome.num_layer_passes for outcome in outcomes)


def create_sim_llm_inference(
    model_path: str,
    max_cache_size: int = 100,
    similarity_threshold: SimilarityThreshold = 0.8,
    device: str = "cuda",
    **kwargs: Any,
) -> SimLLMInference:
    """`SimLLMInference.from_pretrained`, under the name of the demonstration's factory."""
    return SimLLMInference.from_pretrained(model_path, max_cache_size, similarity_threshold, device=device, **kwargs)


def _firsts_then_repeats(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The places of the prompts that are new, then of those that repeat one of them."""
    firsts = list({tuple(row): place for place, row in reversed(list(enumerate(rows)))}.values())[::-1]
    repeats = sorted(set(range(len(rows))) - set(firsts))
    return [sorted(firsts), repeats] if repeats else [sorted(firsts)]


@contextmanager
def first_logits(lm_head: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the head gave in its first forward, `(B, T, V)`, once that has been run."""
    seen: list[torch.Tensor] = []

    def look(_head: torch.nn.Module, _args: Any, logits: torch.Tensor) -> None:
        if not seen:
            seen.append(logits)

    handle = lm_head.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def load_simllm(
    path: str,
    params: SimLLMParams,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    random: bool = False,
) -> SimLLMInference:
    """With `load_llama`. Raises `ValueError` also for a model that mode "aligned" can't serve, or whose context
    is shorter than `max_model_len`.
    """
    config: Any = llama_config(path)
    if max_model_len is not None and not 1 <= max_model_len <= config.max_position_embeddings:
        raise ValueError(
            f"max_model_len is {max_model_len}; this model's contexts have 1 to {config.max_position_embeddings} tokens"
        )
    module = load_llama(path, device=device, dtype=dtype, random=random)
    if max_model_len is not None:
        module.config.max_position_embeddings = max_model_len  # what the rotary embedding took from it is as it was
    return SimLLMInference(module, AutoTokenizer.from_pretrained(path), params)


def load_llama(path: str, *, device: str = "auto", dtype: str = "auto", random: bool = False) -> Any:
    """A `LlamaForCausalLMWithKVReuse`, loaded as `load_module` does; the CPU, with a warning, where there is no such
    device. Raises `ValueError` for a model that isn't a Llama.
    """
    llama_config(path)
    if device != "auto":
        device = str(available_device(device))
    return load_module(path, device=device, dtype=dtype, random=random, kind=LlamaForCausalLMWithKVReuse)
