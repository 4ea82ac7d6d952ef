"""The prefix engine: exact reuse of shared prefixes, readable from top to bottom in `PrefixGeneration._steps`.

What it is not: a batching server. Requests take turns with the model, a piece of prefill or a token at a time. The
cache keeps KV of tokens and logits after them, as tensors on the CPU or on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, StrictBool

from kvarena.contenders.prefix.cache import MIN_TOKENS, PrefixCache
from kvarena.core.devices import to_host
from kvarena.engines.base import GeneratedToken, GenerationRequest, num_tokens_to_generate, spans_of, token_ids_of
from kvarena.engines.hf.model import FIRST_CAPACITY_TOKENS, Cancelled, EngineGeneration, HFModel, Timings
from kvarena.engines.hf.sequence_kv import SequenceKV, empty_host_tensor
from kvarena.engines.sampling import Sampler
from kvarena.engines.store_metrics import StoreFigures

logger = logging.getLogger(__name__)


class PrefixOptions(BaseModel):
    """`use_cache` false computes every token's whole context anew; `use_prefix_cache` false keeps nothing between
    requests. Without a KV cache there is no prefix cache either.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    use_cache: StrictBool = True
    use_prefix_cache: StrictBool = True


@dataclass(frozen=True)
class Kept:
    """A tensor in the cache, or on its way there; `storage` is where copies go."""

    tensor: torch.Tensor
    storage: torch.device

    @property
    def num_bytes(self) -> int:
        return self.tensor.nbytes

    def copy(self) -> Self:
        tensor, storage = self.tensor, self.storage
        if storage.type != "cpu":
            copied = torch.empty(tensor.shape, dtype=tensor.dtype, device=storage).copy_(tensor)
        elif tensor.device.type != "cpu":
            copied = to_host(tensor)
        else:
            copied = empty_host_tensor(tensor.shape, tensor.dtype).copy_(tensor)
        return replace(self, tensor=copied)


class LastLogits(Kept):
    """Logits `(V,)` in the model's own type, so that they come back as they were."""


class KVSegment(Kept):
    """KV `(L, 2, H_kv, T, D)`."""

    def __len__(self) -> int:
        return self.tensor.shape[3]

    def slice(self, start: int, end: int) -> Self:
        return replace(self, tensor=self.tensor[:, :, :, start:end])


Cache = PrefixCache[KVSegment, LastLogits]


@dataclass
class PrefixTimings(Timings):
    """`ttft_ms` is tokenising, prefilling the suffix or the whole, and drawing the first token; looking up (waiting for
    another request included), moving KV and keeping it are counted on their own.
    """

    cache_lookup_ms: float = 0.0
    transfer_ms: float = 0.0
    ttft_ms: float = 0.0
    store_ms: float = 0.0


class PrefixEngine:
    """Implements `kvarena.engines.base.Engine`. `storage` "cpu" keeps prefixes in main memory and moves them on a hit,
    "device" leaves them where the model is.
    """

    contender = "prefix"
    options_model: type[BaseModel] | None = PrefixOptions

    def __init__(
        self,
        model: HFModel,
        model_name: str,
        *,
        cache_bytes: int,
        storage: str = "cpu",
        min_tokens: int = MIN_TOKENS,
        max_entries: int | None = None,
        max_age_s: float | None = None,
    ) -> None:
        if storage not in ("cpu", "device"):
            raise ValueError(f"storage is {storage!r}; it is cpu or device")
        self.model = model
        self.model_name = model_name
        self.max_model_len = model.max_model_len
        self.tokenizer = model.tokenizer
        self.storage = torch.device("cpu") if storage == "cpu" else model.kv_shape.device
        self.cache: Cache = PrefixCache(cache_bytes, min_tokens, max_entries=max_entries, max_age_seconds=max_age_s)
        self.num_store_errors = 0
        self._settings = {
            "storage": storage,
            "cache_bytes": cache_bytes,
            "min_tokens": min_tokens,
            "max_entries": max_entries,
            "max_age_s": max_age_s,
        }

    def generate(self, request: GenerationRequest) -> PrefixGeneration:
        return PrefixGeneration(self, request)

    def describe(self) -> dict[str, Any]:
        return {"contender": self.contender, "defaults": PrefixOptions().model_dump(), **self._settings}

    def store_figures(self) -> StoreFigures:
        stats = self.cache.stats()
        counts = (stats.hits, stats.misses, stats.evictions + stats.expirations, stats.cache_size)
        return StoreFigures(*counts, num_bytes=stats.num_bytes, num_errors=self.num_store_errors)

    def close(self) -> None:
        self.model.close()


class PrefixGeneration(EngineGeneration):
    """One request with the prefix cache."""

    def __init__(self, engine: PrefixEngine, request: GenerationRequest) -> None:
        super().__init__(engine.model, request, PrefixTimings())
        self._engine = engine
        self._options = request.options if isinstance(request.options, PrefixOptions) else PrefixOptions()

    def _steps(self) -> Iterator[GeneratedToken]:
        """The request from its text to its last token."""
        started_s = perf_counter()
        model, cache, timed = self._model, self._engine.cache, self.timings.timed
        sampling, salt = self._request.sampling, self._request.cache_salt

        # 1. Tokenise.
        with timed("tokenize_ms", "ttft_ms"):
            prompt = self.prompt_token_ids = token_ids_of(self._request, model)
            max_tokens = num_tokens_to_generate(len(prompt), sampling.max_tokens, model)
            sampler = Sampler(sampling, model.kv_shape.device)

        # 2. Look up the longest cached prefix.
        use_cache = self._options.use_cache
        use_prefix_cache = use_cache and self._options.use_prefix_cache
        with timed("cache_lookup_ms"):
            lease = cache.acquire(prompt, salt) if use_prefix_cache else None

        kv, answer = None, list[int]()
        try:
            # 3. Split into prefix and suffix.
            num_prefix_tokens = lease.num_tokens if lease else 0
            suffix = prompt[num_prefix_tokens:]
            self._count(len(prompt), num_prefix_tokens)

            # 4. A hit: its KV, and its last logits when no suffix is left, which costs no forward pass at all.
            # 5. The suffix, or on a miss the whole prompt: prefill, and keep KV and logits.
            kv = model.new_kv(len(prompt) + min(max_tokens, FIRST_CAPACITY_TOKENS)) if use_cache else None
            segments = list(lease.segments) if lease else []
            if not suffix:
                assert lease is not None
                assert lease.tail is not None, "a whole prompt is matched only with its logits"
                logits = lease.tail.tensor.to(model.kv_shape.device)
            else:
                if kv is not None:
                    with timed("transfer_ms"):
                        self._restore(kv, segments)
                with timed("prefill_ms", "ttft_ms"):
                    logits = model.prefill(kv, suffix, self._closed.is_set) if kv else model.without_kv(prompt)
                if lease and kv is not None:
                    with timed("store_ms"):
                        self._keep(lease.insert, kv, num_prefix_tokens, logits)

            # 6. Decode from the cached or computed logits. 7. Stream the tokens.
            with timed("ttft_ms"):
                token = model.run(sampler.draw, logits)
            self.timings.first_token_ms = (perf_counter() - started_s) * 1000
            while True:
                yield self._drawn(token)
                if self.finish_reason == "stop":
                    break
                answer.append(token.token_id)
                if len(answer) == max_tokens:
                    self.finish_reason = "length"
                    break
                if self._closed.is_set():
                    break
                if kv is not None and kv.length == 0 and segments:
                    with timed("transfer_ms"):  # nothing needed it until now
                        self._restore(kv, segments)
                with timed("decode_ms"):
                    logits = model.decode(kv, token.token_id) if kv else model.without_kv([*prompt, *answer])
                    token = model.run(sampler.draw, logits)
        finally:
            # 8. Keep the answer's KV for the turn that follows it; text and timings are the caller's now.
            if lease and kv is not None and kv.length > len(prompt):
                computed = [*prompt, *answer][: kv.length]
                with timed("store_ms"):
                    self._keep(partial(cache.insert, computed, len(prompt), salt=salt), kv, len(prompt), logits)
            if lease:
                lease.close()

    def _count(self, num_prompt_tokens: int, num_prefix_tokens: int) -> None:
        self.report.num_prompt_tokens = num_prompt_tokens
        self.report.num_reused_tokens = num_prefix_tokens
        self.report.num_computed_tokens = num_prompt_tokens - num_prefix_tokens
        self.report.details |= {
            "cache_enabled": self._options.use_cache,
            "prefix_cache_enabled": self._options.use_cache and self._options.use_prefix_cache,
            "prefix_cache_hit": num_prefix_tokens > 0,
            "prefix_cache_reason": self._why_nothing(num_prompt_tokens) if num_prefix_tokens == 0 else None,
            "num_prefix_tokens": num_prefix_tokens,
            "spans": spans_of([(0, num_prefix_tokens, "prefix")], num_prompt_tokens),
        }

    def _why_nothing(self, num_prompt_tokens: int) -> str:
        """Why no prefix was reused."""
        for switch in ("use_cache", "use_prefix_cache"):
            if not getattr(self._options, switch):
                return f"{switch} is false"
        min_tokens = self._engine.cache.min_tokens
        if num_prompt_tokens < min_tokens:
            return f"prompt of {num_prompt_tokens} tokens is below min_tokens {min_tokens}"
        return f"no cached prefix of at least {min_tokens} tokens (min_tokens)"

    def _restore(self, kv: SequenceKV, segments: list[KVSegment]) -> None:
        for segment in segments:
            self._model.run(kv.restore, segment.tensor)

    def _keep(
        self, insert: Callable[[KVSegment, LastLogits], bool], kv: SequenceKV, start: int, logits: torch.Tensor
    ) -> None:
        """Costs at most the reuse: an answer doesn't fail because its KV couldn't be kept."""
        storage = self._engine.storage
        segment = KVSegment(kv.filled(start, kv.length), storage)
        try:
            self._model.run(insert, segment, LastLogits(logits, storage))
        except Cancelled:
            pass  # the server is ending
        except Exception:
            logger.exception("the KV of request %s could not be kept", self._request.request_id)
            self._engine.num_store_errors += 1

    def _timing_figures(self) -> dict[str, float]:
        return super()._timing_figures() | {"prefix_tokens_saved": self.report.num_reused_tokens}
