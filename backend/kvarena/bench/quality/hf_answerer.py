"""Contenders in this process, on a Hugging Face model: `plain` prefills every prompt whole, `blend` blends chunks.

The only part of `eval` and `calibrate` that needs torch: the others ask servers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from kvarena.bench.measure import Reuse
from kvarena.bench.quality.asking import Answerer, Asking, GreedyAnswer, InContexts, Messages, NoAnswer, common_prefix
from kvarena.bench.variants import Variant
from kvarena.contenders.servers import GIB
from kvarena.documents import TextChunk, contexts_for_scores, contexts_for_seams, join_chunks
from kvarena.engines.hf.blend import HFBlender
from kvarena.engines.hf.model import HFModel
from kvarena.engines.hf.sequence_kv import SequenceKV
from kvarena.engines.vllm.config import BlendConfig
from kvarena.model import Model, find_model
from kvarena.policies.params import BlendParams, read_blend_profile
from kvarena.stores.memory import MemoryStore

CONTENDERS = ("plain", "blend")


class PlainAnswerer(Answerer):
    """Full prefill and greedy decoding."""

    def __init__(self, name: str, model: HFModel, source: Model, separator: str | None) -> None:
        self.name, self.separator = name, separator
        self.num_layers = model.kv_shape.num_layers
        self.model_folder = Path(source.name) if source.is_local else None
        self._model, self._model_name = model, source.served_name

    def answer(
        self, messages: Messages, variant: Variant, asking: Asking, full: GreedyAnswer | None = None
    ) -> GreedyAnswer:
        """Where full prefill's answer is given, its tokens are fed first, all in one forward.

        That gives the distributions to compare by, and this answer itself up to the first other token, from which it is
        decoded on.
        """
        started_s, max_tokens = perf_counter(), asking.max_tokens
        token_ids = self._model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        capacity, longest = len(token_ids) + max_tokens, self._model.max_model_len
        if capacity > longest:
            raise NoAnswer(f"{len(token_ids)} tokens and an answer of {max_tokens} are more than the model's {longest}")
        kv, logits, reuse = self._prefill(token_ids, variant, capacity)
        first = int(logits.argmax())  # on a GPU this waits for it
        ttft_ms = 1000 * (perf_counter() - started_s)
        if full is None:
            answer = self._greedy(kv, logits, [], max_tokens)
            forced = self._forced(kv, len(token_ids), logits, answer)
        else:
            forced = self._forced(kv, len(token_ids), logits, full.token_ids)
            likeliest = [first, *forced[1:].argmax(-1).tolist()]
            num_same = common_prefix(likeliest, full.token_ids)
            answer = list(full.token_ids[:num_same])
            if num_same < len(full.token_ids) and not asking.compares_only:
                kv.truncate(len(token_ids) + num_same)
                answer = self._greedy(kv, forced[num_same], answer, max_tokens)
        is_complete = bool(answer) and answer[-1] in self._model.eos_token_ids
        text = self._model.tokenizer.decode(answer[:-1] if is_complete else answer, skip_special_tokens=True)
        logprobs = forced.float().log_softmax(-1)
        return GreedyAnswer(text, is_complete, ttft_ms, reuse, token_ids=tuple(answer), forced_logprobs=logprobs)

    def _greedy(self, kv: SequenceKV, logits: torch.Tensor, begun: list[int], max_tokens: int) -> list[int]:
        """Goes on with an answer whose beginning `kv` holds, to its end token or its `max_tokens`-th."""
        answer = list(begun)
        while True:
            answer.append(int(logits.argmax()))
            if answer[-1] in self._model.eos_token_ids or len(answer) >= max_tokens:
                return answer
            logits = self._model.decode(kv, answer[-1])

    def _forced(
        self, kv: SequenceKV, num_prompt_tokens: int, logits: torch.Tensor, answer: Sequence[int]
    ) -> torch.Tensor:
        """The logits `(T, V)` of each of an answer's `T` tokens after the prompt, whose own are `logits` `(V,)`."""
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

    def _prefill(
        self, token_ids: Sequence[int], variant: Variant, capacity: int
    ) -> tuple[SequenceKV, torch.Tensor, Reuse]:
        kv = self._model.new_kv(capacity)
        return kv, self._model.prefill(kv, token_ids, lambda: False), Reuse(len(token_ids), 0)


class BlendAnswerer(PlainAnswerer):
    """Blends over stores in main memory, one for each sink."""

    is_blend = True

    def __init__(
        self,
        name: str,
        model: HFModel,
        source: Model,
        config: BlendConfig,
        store_bytes: int,
        more_sinks: Sequence[int] = (),
    ) -> None:
        super().__init__(name, model, source, config.separator)
        self._defaults = config.params
        self._blenders: dict[int, HFBlender] = {}
        for num_tokens in (config.sink_tokens, *more_sinks):
            checked = replace(config, sink_tokens=num_tokens)
            store = MemoryStore(store_bytes)
            blender = HFBlender(
                model, store, separator=config.separator, sink_tokens=checked.sink_tokens, seams=config.seams
            )
            self._blenders.setdefault(len(blender.sink), blender)
        self.sinks = tuple(self._blenders)
        self.has_seams = config.seams

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        for chunk in chunks:
            text = join_chunks([chunk.text], separator)
            token_ids: list[int] = self._model.tokenizer.encode(text, add_special_tokens=False)
            if len(token_ids) > self._model.max_model_len:
                raise NoAnswer(f"chunk {chunk.name} has {len(token_ids)} tokens, more than the model's contexts")
            for blender in self._blenders.values():
                blender.prefill(token_ids, BlendParams("none"), len(token_ids))
            on_chunk()

    def compute(
        self, what: InContexts, chunks: Sequence[TextChunk], separator: str, on_prompt: Callable[[int, int], None]
    ) -> None:
        is_scores, longest = what == "scores", self._model.max_model_len
        names = [chunk.name for chunk in chunks]
        contexts = contexts_for_scores(chunks, names, longest) if is_scores else contexts_for_seams(chunks, longest)
        for number, context in enumerate(contexts, start=1):
            chat = [{"role": "user", "content": join_chunks([chunk.text for chunk in context], separator)}]
            token_ids = self._model.tokenizer.apply_chat_template(chat, return_dict=False)
            for blender in self._blenders.values():
                blender.score(token_ids) if is_scores else blender.make_seams(token_ids)
            on_prompt(number, len(contexts))

    def _prefill(
        self, token_ids: Sequence[int], variant: Variant, capacity: int
    ) -> tuple[SequenceKV, torch.Tensor, Reuse]:
        params = BlendParams(**(vars(self._defaults) | variant.choices))
        sink = self.sinks[0] if variant.sink_tokens is None else variant.sink_tokens
        blended = self._blenders[sink].prefill(token_ids, params, capacity)
        report = blended.report
        reused, recomputed = report.num_reused_tokens, report.num_recomputed_tokens
        return (
            blended.kv,
            blended.logits,
            Reuse(len(token_ids), reused, recomputed, unscored_chunks=report.unscored_chunks),
        )


def engines(
    wanted: Sequence[str], model: str | None, separator: str | None, store_gb: float, more_sinks: Sequence[int] = ()
) -> dict[str, Answerer]:
    """`plain`, `blend` or both on a model in this process; they share its weights. Raises `ValueError`, `OSError`."""
    if unknown := [name for name in wanted if name not in CONTENDERS]:
        raise ValueError(f"in this process there are {', '.join(CONTENDERS)}, not {unknown[0]!r}")
    found = find_model(model, "cpu")
    profile = read_blend_profile(found.name)
    config = BlendConfig(**(profile | ({"separator": separator} if separator is not None else {})))
    shared = HFModel.load(found.name), found
    store_bytes = int(store_gb * GIB)
    return {
        name: BlendAnswerer(name, *shared, config, store_bytes, more_sinks)
        if name == "blend"
        else PlainAnswerer(name, *shared, config.separator)
        for name in wanted or CONTENDERS
    }
