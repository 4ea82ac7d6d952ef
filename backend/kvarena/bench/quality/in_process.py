"""Contenders in this process, on a Hugging Face model: `plain` prefills every prompt whole, `blend` blends chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import torch

from kvarena.bench.openai_server import NoAnswer
from kvarena.bench.quality.answers import NUM_LOGPROBS, Answer, Messages, Reuse
from kvarena.bench.quality.setups import Setup
from kvarena.context import TextChunk, join_chunks
from kvarena.engines.blend.prefill import HFBlender
from kvarena.engines.hf_model import HFModel
from kvarena.engines.sequence_kv import SequenceKV
from kvarena.reuse.params import BlendParams
from kvarena.reuse.store import MemoryStore
from kvarena.stack.model import Model

CONTENDERS = ("plain", "blend")


class PlainAnswerer:
    """Full prefill and greedy decoding."""

    is_blend = False

    def __init__(self, name: str, model: HFModel, source: Model, separator: str | None) -> None:
        self.name, self.separator = name, separator
        self.num_layers: int | None = model.kv_shape.num_layers
        self.model_folder = Path(source.name) if source.is_local else None
        self._model, self._model_name = model, source.served_name

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        """Keeps nothing."""

    def answer(self, messages: Messages, setup: Setup, max_tokens: int) -> Answer:
        started_s = perf_counter()
        token_ids = self._model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        capacity, longest = len(token_ids) + max_tokens, self._model.max_model_len
        if capacity > longest:
            raise NoAnswer(f"{len(token_ids)} tokens and an answer of {max_tokens} are more than the model's {longest}")
        kv, logits, reuse = self._prefill(token_ids, setup, capacity)
        first_logprobs = self._logprobs(logits)
        answer: list[int] = []
        ttft_ms, is_complete = 0.0, False
        for _ in range(max_tokens):
            token = int(logits.argmax())
            ttft_ms = ttft_ms or 1000 * (perf_counter() - started_s)
            if is_complete := token in self._model.eos_token_ids:
                break
            answer.append(token)
            logits = self._model.decode(kv, token)
        text = self._model.tokenizer.decode(answer, skip_special_tokens=True)
        return Answer(text, is_complete, ttft_ms, reuse, first_logprobs)

    def describe(self) -> dict[str, object]:
        shape = self._model.kv_shape
        device, dtype = str(shape.device), str(shape.dtype).removeprefix("torch.")
        return {"model": self._model_name, "num_threads": torch.get_num_threads(), "device": device, "dtype": dtype}

    def close(self) -> None:
        self._model.close()

    def _prefill(self, token_ids: Sequence[int], setup: Setup, capacity: int) -> tuple[SequenceKV, torch.Tensor, Reuse]:
        kv = self._model.new_kv(capacity)
        return kv, self._model.prefill(kv, token_ids, lambda: False), Reuse(len(token_ids), 0)

    def _logprobs(self, logits: torch.Tensor) -> dict[str, float]:
        best = logits.float().log_softmax(-1).topk(min(NUM_LOGPROBS, len(logits)))
        texts = [self._model.tokenizer.decode([token]) for token in best.indices.tolist()]
        return dict(zip(reversed(texts), reversed(best.values.tolist()), strict=True))


class BlendAnswerer(PlainAnswerer):
    """Blends over a store of its own in main memory."""

    is_blend = True

    def __init__(
        self, name: str, model: HFModel, source: Model, separator: str, defaults: BlendParams, store_bytes: int
    ) -> None:
        super().__init__(name, model, source, separator)
        self._defaults = defaults
        self._store = MemoryStore(store_bytes)
        self._blender = HFBlender(model, self._store, separator=separator)

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        for chunk in chunks:
            text = join_chunks([chunk.text], separator)
            token_ids = self._model.tokenizer.encode(text, add_special_tokens=False)
            if len(token_ids) > self._model.max_model_len:
                raise NoAnswer(f"chunk {chunk.name} has {len(token_ids)} tokens, more than the model's contexts")
            self._blender.prefill(token_ids, BlendParams("none"), len(token_ids))
            on_chunk()

    def _prefill(self, token_ids: Sequence[int], setup: Setup, capacity: int) -> tuple[SequenceKV, torch.Tensor, Reuse]:
        params = BlendParams(**(vars(self._defaults) | setup.choices))
        blended = self._blender.prefill(token_ids, params, capacity)
        report = blended.report
        reuse = Reuse(len(token_ids), report.num_reused_tokens, report.num_recomputed_tokens)
        return blended.kv, blended.logits, reuse
