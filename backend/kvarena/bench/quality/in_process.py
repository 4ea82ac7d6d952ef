"""Contenders in this process, on a Hugging Face model: `plain` prefills every prompt whole, `blend` blends chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import torch

from kvarena.bench.openai_server import NoAnswer
from kvarena.bench.quality.answers import Answer, Messages, Reuse
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

    def answer(
        self,
        messages: Messages,
        setup: Setup,
        max_tokens: int,
        full: Answer | None = None,
        compares_only: bool = False,
    ) -> Answer:
        """Where full prefill's answer is given, its tokens are fed first, all in one forward.

        That gives the distributions to compare by, and this answer itself up to the first other token, from which it is
        decoded on.
        """
        started_s = perf_counter()
        token_ids = self._model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        capacity, longest = len(token_ids) + max_tokens, self._model.max_model_len
        if capacity > longest:
            raise NoAnswer(f"{len(token_ids)} tokens and an answer of {max_tokens} are more than the model's {longest}")
        kv, logits, reuse = self._prefill(token_ids, setup, capacity)
        first = int(logits.argmax())  # on a GPU this waits for it
        ttft_ms = 1000 * (perf_counter() - started_s)
        if full is None:
            answer = self._greedy(kv, logits, [], max_tokens)
            forced = self._forced(kv, len(token_ids), logits, answer)
        else:
            forced = self._forced(kv, len(token_ids), logits, full.token_ids)
            likeliest = [first, *forced[1:].argmax(-1).tolist()]
            num_same = _common_prefix(likeliest, full.token_ids)
            answer = list(full.token_ids[:num_same])
            if num_same < len(full.token_ids) and not compares_only:
                kv.truncate(len(token_ids) + num_same)
                answer = self._greedy(kv, forced[num_same], answer, max_tokens)
        is_complete = bool(answer) and answer[-1] in self._model.eos_token_ids
        text = self._model.tokenizer.decode(answer[:-1] if is_complete else answer, skip_special_tokens=True)
        log_probabilities = forced.float().log_softmax(-1)
        return Answer(text, is_complete, ttft_ms, reuse, token_ids=tuple(answer), forced_logprobs=log_probabilities)

    def _greedy(self, kv: SequenceKV, logits: torch.Tensor, begun: list[int], max_tokens: int) -> list[int]:
        """An answer from its beginning, which `kv` holds, to its end token or to its `max_tokens`-th."""
        answer = list(begun)
        while True:
            answer.append(int(logits.argmax()))
            if answer[-1] in self._model.eos_token_ids or len(answer) >= max_tokens:
                return answer
            logits = self._model.decode(kv, answer[-1])

    def _forced(
        self, kv: SequenceKV, num_prompt_tokens: int, logits: torch.Tensor, answer: Sequence[int]
    ) -> torch.Tensor:
        """The logits `(T, V)` of each of an answer's `T` tokens behind the prompt, whose own are `logits` `(V,)`."""
        kv.truncate(num_prompt_tokens)
        if len(answer) == 1:
            return logits[None]
        return torch.cat([logits[None], self._model.run_through(kv, answer[:-1])])

    def describe(self) -> dict[str, object]:
        shape = self._model.kv_shape
        device, dtype = str(shape.device), str(shape.dtype).removeprefix("torch.")
        return {"model": self._model_name, "num_threads": torch.get_num_threads(), "device": device, "dtype": dtype}

    def close(self) -> None:
        self._model.close()

    def _prefill(self, token_ids: Sequence[int], setup: Setup, capacity: int) -> tuple[SequenceKV, torch.Tensor, Reuse]:
        kv = self._model.new_kv(capacity)
        return kv, self._model.prefill(kv, token_ids, lambda: False), Reuse(len(token_ids), 0)


def _common_prefix(tokens: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(tokens, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


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
