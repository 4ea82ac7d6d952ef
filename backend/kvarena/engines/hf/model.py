"""A Hugging Face causal language model: one sequence at a time, its KV in a `SequenceKV`.

All torch work runs in the model's own thread, piece by piece in the order of asking: a long prefill is cut, so that
other requests' tokens go in between, and no two forwards fight over the cores. `EngineGeneration` has what all
generations over such a model share: how they begin, are closed, timed and end.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvarena.core.report import Stopwatch
from kvarena.engines.base import FinishReason, GeneratedToken, GenerationRequest, Report, Tokenizer
from kvarena.engines.hf import attention
from kvarena.engines.hf.sequence_kv import KVShape, SequenceKV

PREFILL_PIECE_TOKENS = 512

P = ParamSpec("P")
R = TypeVar("R")


class UnsupportedModel(ValueError):
    """An engine can't use this model; the message says why."""


def load_module(
    path: str, *, device: str = "auto", dtype: str = "auto", random: bool = False, kind: Any = AutoModelForCausalLM
) -> Any:
    """A model of Transformers, from a local folder or a hub name; `dtype` "auto" is the checkpoint's.

    `random` draws the weights by the config: any shape, no download. Raises `OSError` when there is no such model.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if random:
        config = AutoConfig.from_pretrained(path)
        torch_dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
        from_config = kind.from_config if kind is AutoModelForCausalLM else kind._from_config
        with torch.device(device):  # a CPU takes minutes for the random numbers of some billion weights
            module = from_config(config, dtype=torch_dtype, attn_implementation=attention.NAME)
    else:
        module = kind.from_pretrained(path, dtype=dtype, attn_implementation=attention.NAME)
    return module.to(device).eval()


class HFModel:
    """`max_model_len` is the longest context in tokens, prompt and answer together."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        max_model_len: int | None = None,
        piece_tokens: int = PREFILL_PIECE_TOKENS,
    ) -> None:
        self.module: Any = model.eval()
        """The network itself, for work in the model's thread."""
        self.tokenizer = tokenizer
        config: Any = self.module.config.get_text_config()
        own_len = int(getattr(config, "max_position_embeddings", 0) or 0)
        self.max_model_len = max_model_len or own_len
        if self.max_model_len < 1 or (own_len and self.max_model_len > own_len):
            raise ValueError(f"max_model_len is {max_model_len}; this model's contexts have 1 to {own_len} tokens")
        self.vocab_size = int(config.vocab_size)
        self.eos_token_ids = frozenset(_eos_token_ids(model))
        self.piece_tokens = piece_tokens
        self.num_forwards = 0
        """How many forwards were run, and over how many tokens: what reuse saves."""
        self.num_forward_tokens = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.kv_shape = self.run(self._probe)

    @classmethod
    def load(
        cls,
        path: str,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        random: bool = False,
        piece_tokens: int = PREFILL_PIECE_TOKENS,
    ) -> HFModel:
        """As `load_module`; `piece_tokens` of a prefill are run at once."""
        module = load_module(path, device=device, dtype=dtype, random=random)
        return cls(module, AutoTokenizer.from_pretrained(path), max_model_len, piece_tokens)

    def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs torch work in the model's thread and waits for it. Raises `Cancelled` when the model was closed."""

        def without_gradients() -> R:
            with torch.inference_mode():
                return work(*args, **kwargs)

        try:
            running = self._thread.submit(without_gradients)
        except RuntimeError as error:  # how an executor refuses work
            raise Cancelled from error
        try:
            return running.result()
        except CancelledError as error:
            raise Cancelled from error

    def new_kv(self, capacity: int) -> SequenceKV:
        return SequenceKV(self.kv_shape, min(capacity, self.max_model_len))

    def prefill(self, kv: SequenceKV, token_ids: Sequence[int], is_cancelled: Callable[[], bool]) -> torch.Tensor:
        """Runs the tokens after those that `kv` holds. Returns the logits `(V,)` of the last one."""
        assert token_ids, "nothing to prefill"
        for start in range(0, len(token_ids), self.piece_tokens):
            if is_cancelled():
                raise Cancelled
            logits = self.run(self._forward, token_ids[start : start + self.piece_tokens], kv)
        return logits

    def decode(self, kv: SequenceKV, token_id: int) -> torch.Tensor:
        """The logits `(V,)` after one more token."""
        return self.run(self._forward, [token_id], kv)

    def run_through(self, kv: SequenceKV, token_ids: Sequence[int]) -> torch.Tensor:
        """The logits `(T, V)` after each of some more tokens, from one forward."""
        return self.run(self._forward_all, token_ids, kv)

    def without_kv(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The logits `(V,)` after a sequence, every token of it computed now and nothing kept."""
        return self.run(self._forward, token_ids, None)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    # -- in the model's thread -------------------------------------------------------------------------------------

    def forward(self, token_ids: Sequence[int], *, logits_to_keep: int = 1, **arguments: Any) -> Any:
        """The network's own output for these tokens; `arguments` are Hugging Face's. Called in the model's thread."""
        self.num_forwards += 1
        self.num_forward_tokens += len(token_ids)
        input_ids = torch.tensor([list(token_ids)], device=self.kv_shape.device)
        return self.module(input_ids=input_ids, logits_to_keep=logits_to_keep, **arguments)

    def _forward(self, token_ids: Sequence[int], kv: SequenceKV | None) -> torch.Tensor:
        logits: torch.Tensor = self.forward(token_ids, past_key_values=kv, use_cache=kv is not None).logits[0, -1]
        return logits

    def _forward_all(self, token_ids: Sequence[int], kv: SequenceKV) -> torch.Tensor:
        output = self.forward(token_ids, logits_to_keep=len(token_ids), past_key_values=kv, use_cache=True)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _probe(self) -> KVShape:
        """Looks at what the model keeps of one token."""
        if os.environ.get("OMP_NUM_THREADS") is None:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
        device = next(self.module.parameters()).device
        output = self.module(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=True)
        cache = output.past_key_values
        layers = cache.layers if isinstance(cache, DynamicCache) else []
        shapes = {(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in layers if _is_plain(layer)}
        if len(shapes) != 1 or not all(_is_plain(layer) for layer in layers):
            raise UnsupportedModel(
                f"{type(self.module).__name__} doesn't keep one key and one value of a shape per layer"
            )
        (keys, values), *_ = shapes
        if keys != values:
            raise UnsupportedModel(f"keys are {keys} and values {values}; they must have one shape")
        return KVShape(len(layers), keys[1], keys[3], layers[0].keys.dtype, device)


class Cancelled(Exception):
    """The request was given up, or the model closed, in the middle of the work."""


def _is_plain(layer: object) -> bool:
    return isinstance(layer, DynamicLayer) and isinstance(getattr(layer, "keys", None), torch.Tensor)


def _eos_token_ids(model: Any) -> list[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config().eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


@dataclass
class Timings(Stopwatch):
    """Milliseconds. `first_token_ms` is all that passed until the first token, whatever it was spent on. An engine's
    own stages are further fields.
    """

    tokenize_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0

    def rounded(self) -> dict[str, float]:
        """By name, as a report has them."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


FIRST_CAPACITY_TOKENS = 256
"""A sequence's memory has room for so many tokens of the answer, or somewhat fewer, before it grows."""


class EngineGeneration(ABC):
    """One request. Implements `kvarena.engines.base.Generation`."""

    def __init__(self, model: HFModel, request: GenerationRequest, timings: Timings) -> None:
        self.report = Report()
        self.finish_reason: FinishReason | None = None
        self.prompt_token_ids: Sequence[int] = ()
        self.timings = timings
        self._model = model
        self._request = request
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[GeneratedToken]:
        try:
            with self.timings.timed("total_ms"):
                yield from self._steps()
        except Cancelled:
            pass
        finally:
            self.report.details |= {"timings": self._timing_figures()}

    def close(self) -> None:
        self._closed.set()

    @abstractmethod
    def _steps(self) -> Iterator[GeneratedToken]:
        """Tokens until `finish_reason` is set or the generation was closed. Fills in the report."""

    def _timing_figures(self) -> dict[str, float]:
        return self.timings.rounded()

    def _drawn(self, token: GeneratedToken) -> GeneratedToken:
        """The token, marked where it ends the answer; `finish_reason` is set then."""
        if token.token_id not in self._model.eos_token_ids or self._request.sampling.ignore_eos:
            return token
        self.finish_reason = "stop"
        return replace(token, is_end=True)
