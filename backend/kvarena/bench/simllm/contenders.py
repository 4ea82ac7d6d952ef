"""What is compared: engines with a mode and a threshold each, and one without reuse, all over the same weights."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from time import perf_counter, process_time
from typing import Any

import torch
from transformers import AutoTokenizer

from kvarena.api.engine import GenerationRequest, Report, Sampling
from kvarena.bench.memory import PeakMemory
from kvarena.engines.simllm.engine import SimLLMEngine
from kvarena.engines.simllm.loading import load_module
from kvarena.engines.simllm.options import SimLLMOptions
from kvarena.simllm import AlignedParams, SimLLMInference, SimLLMParams
from kvarena.simllm.params import checked_threshold
from kvarena.stack.model import find_model
from kvarena.vllm_plugin.config import BlendConfig, read_blend_profile

NO_REUSE = "no reuse"


@dataclass(frozen=True)
class Setup:
    """`mode` and `similarity_threshold` are None for the one without reuse."""

    mode: str | None = None
    similarity_threshold: float | None = None

    @property
    def params(self) -> SimLLMParams:
        """Raises `ValueError` naming a mode or a threshold that can't be chosen."""
        if self.mode is None or self.similarity_threshold is None:
            return SimLLMParams()
        return SimLLMParams(self.mode, similarity_threshold=checked_threshold(self.similarity_threshold))

    @property
    def label(self) -> str:
        return NO_REUSE if self.mode is None else f"{self.mode} {self.similarity_threshold:g}"


@dataclass(frozen=True)
class TaskAnswer:
    """One answer as the caller of the engine sees it. `token_ids` and `text` end before the end-of-sequence token.

    `cpu_ms` is the process's time on all cores, which other work on the machine changes less. `peak_rise_bytes`: how
    far the answer made main memory rise.
    """

    token_ids: tuple[int, ...]
    text: str
    first_token_ms: float
    total_ms: float
    cpu_ms: float
    peak_rise_bytes: int | None
    report: Report


@dataclass
class Contender:
    """An engine with tasks of its own."""

    setup: Setup
    engine: SimLLMEngine
    _memory: PeakMemory = field(default_factory=PeakMemory)

    def answer(self, prompt: Sequence[int], num_steps: int) -> TaskAnswer:
        """So many tokens are generated, also where the answer ends earlier."""
        sampling = Sampling(max_tokens=num_steps, temperature=0.0, ignore_eos=True)
        options = SimLLMOptions(reuse=self.setup.mode is not None)
        request = GenerationRequest(uuid.uuid4().hex, tuple(prompt), sampling, options=options)
        self._memory.start()
        token_ids: list[int] = []
        cpu_s, started_s, first_s = process_time(), perf_counter(), None
        generation = self.engine.generate(request)
        for token in generation:
            token_ids.append(token.token_id)
            first_s = first_s or perf_counter()
        ended_s = perf_counter()
        token_ids = list(takewhile(lambda token_id: token_id not in self.engine.model.eos_token_ids, token_ids))
        return TaskAnswer(
            tuple(token_ids),
            self.engine.tokenizer.decode(token_ids, skip_special_tokens=True),
            1000 * ((first_s or ended_s) - started_s),
            1000 * (ended_s - started_s),
            1000 * (process_time() - cpu_s),
            self._memory.rise_bytes(),
            generation.report,
        )

    @property
    def task_bytes(self) -> int:
        """The KV that is kept of tasks."""
        return int(self.engine.simllm.get_statistics()["num_bytes"])


@dataclass(frozen=True)
class Network:
    """A Llama that contenders share, and what goes with it. `has_random_weights`: its answers mean nothing."""

    name: str
    module: Any
    tokenizer: Any
    config: BlendConfig
    has_random_weights: bool

    @classmethod
    def load(cls, folder: str, name: str, *, dtype: str = "auto", random: bool = False) -> Network:
        """As `load_module`."""
        module = load_module(folder, dtype=dtype, random=random)
        profile = BlendConfig(**read_blend_profile(folder))
        return cls(name, module, AutoTokenizer.from_pretrained(folder), profile, random)

    @classmethod
    def find(cls, model: str | None, *, dtype: str | None = None) -> Network:
        """A trained model as `kvarena.stack` finds it, by default the town model; `dtype` None is the machine's best.

        Raises `StackError` for a folder that isn't there.
        """
        found = find_model(model, "cpu")
        return cls.load(found.name, found.served_name, dtype=dtype or best_dtype())

    def contender(self, setup: Setup, max_cache_size: int) -> Contender:
        """With a manager of its own, which hangs on a copy of the model's modules; their weights are the same ones."""
        params = replace(setup.params, max_cache_size=max_cache_size, aligned=AlignedParams(blend=self.config.params))
        shared = [*self.module.parameters(), *self.module.buffers()]
        twin = copy.deepcopy(self.module, {id(tensor): tensor for tensor in shared})
        return Contender(setup, SimLLMEngine(SimLLMInference(twin, self.tokenizer, params), self.name))

    def token_ids(self, messages: Sequence[Any]) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids


def best_dtype() -> str:
    """Few CPUs have bfloat16 instructions; without them float32 is several times faster. "auto" is the checkpoint's."""
    return "auto" if torch.cuda.is_available() else "float32"


def setups(modes: Sequence[str], thresholds: Sequence[float]) -> list[Setup]:
    """The one without reuse first. Raises `ValueError` naming a mode or threshold that can't be chosen."""
    chosen = [Setup(mode, threshold) for mode in modes for threshold in thresholds]
    for setup in chosen:
        _ = setup.params
    return [Setup(), *dict.fromkeys(chosen)]
