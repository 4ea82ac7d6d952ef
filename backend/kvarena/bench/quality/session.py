"""The contenders of one measurement: found, warmed, asked with progress, and closed.

They are servers by address, services of the running stack by name, or engines in this process on a Hugging Face
model: `plain` prefills every prompt whole, `blend` blends chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from kvarena.bench.console import counted_progress, progress
from kvarena.bench.quality.asking import Answer, Answerer, Asking, Attempt, Messages, NoAnswer, Reuse, ask_all
from kvarena.bench.quality.http_answerer import HTTPAnswerer
from kvarena.bench.quality.questions import QuestionSet
from kvarena.bench.variants import Variant, blend_variants, find_reference, reads_scores
from kvarena.documents import FALLBACK_SEPARATOR, TextChunk, contexts_for_scores, join_chunks
from kvarena.engines.hf.blend import HFBlender
from kvarena.engines.hf.model import HFModel
from kvarena.engines.hf.sequence_kv import SequenceKV
from kvarena.engines.vllm.config import BlendConfig
from kvarena.home import Home
from kvarena.model import Model, find_model
from kvarena.policies.params import BlendParams
from kvarena.policies.profile import read_blend_profile
from kvarena.stack.record import read_record
from kvarena.stack.settings import CONTENDERS as STACK_CONTENDERS
from kvarena.stack.settings import shown_api_key
from kvarena.stores.memory import MemoryStore

CONTENDERS = ("plain", "blend")


class PlainAnswerer:
    """Full prefill and greedy decoding."""

    is_blend = False

    def __init__(self, name: str, model: HFModel, source: Model, separator: str | None) -> None:
        self.name, self.separator = name, separator
        self.num_layers: int | None = model.kv_shape.num_layers
        self.model_folder = Path(source.name) if source.is_local else None
        self.sinks: Sequence[int] = ()
        self._model, self._model_name = model, source.served_name

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        """Keeps nothing."""

    def score(self, chunks: Sequence[TextChunk], separator: str, on_prompt: Callable[[int, int], None]) -> None:
        """Chooses nothing."""

    def answer(
        self,
        messages: Messages,
        variant: Variant,
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
        kv, logits, reuse = self._prefill(token_ids, variant, capacity)
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

    def _prefill(
        self, token_ids: Sequence[int], variant: Variant, capacity: int
    ) -> tuple[SequenceKV, torch.Tensor, Reuse]:
        kv = self._model.new_kv(capacity)
        return kv, self._model.prefill(kv, token_ids, lambda: False), Reuse(len(token_ids), 0)


def _common_prefix(tokens: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(tokens, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class BlendAnswerer(PlainAnswerer):
    """Blends over stores in main memory, one for each of the sinks that chunks are computed after."""

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
            blender = HFBlender(model, store, separator=config.separator, sink_tokens=checked.sink_tokens)
            self._blenders.setdefault(len(blender.sink), blender)
        self.sinks = tuple(self._blenders)

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        for chunk in chunks:
            token_ids = self._joined([chunk], separator)
            if len(token_ids) > self._model.max_model_len:
                raise NoAnswer(f"chunk {chunk.name} has {len(token_ids)} tokens, more than the model's contexts")
            for blender in self._blenders.values():
                blender.prefill(token_ids, BlendParams("none"), len(token_ids))
            on_chunk()

    def score(self, chunks: Sequence[TextChunk], separator: str, on_prompt: Callable[[int, int], None]) -> None:
        contexts = contexts_for_scores(chunks, [chunk.name for chunk in chunks], self._model.max_model_len)
        for number, context in enumerate(contexts, start=1):
            for blender in self._blenders.values():
                blender.score(self._chat_over(context, separator))
            on_prompt(number, len(contexts))

    def _chat_over(self, chunks: Sequence[TextChunk], separator: str) -> list[int]:
        text = join_chunks([chunk.text for chunk in chunks], separator)
        messages = [{"role": "user", "content": text}]
        token_ids: list[int] = self._model.tokenizer.apply_chat_template(messages, return_dict=False)
        return token_ids

    def _joined(self, chunks: Sequence[TextChunk], separator: str) -> list[int]:
        text = join_chunks([chunk.text for chunk in chunks], separator)
        token_ids: list[int] = self._model.tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    def _prefill(
        self, token_ids: Sequence[int], variant: Variant, capacity: int
    ) -> tuple[SequenceKV, torch.Tensor, Reuse]:
        params = BlendParams(**(vars(self._defaults) | variant.choices))
        sink = self.sinks[0] if variant.sink_tokens is None else variant.sink_tokens
        blended = self._blenders[sink].prefill(token_ids, params, capacity)
        report = blended.report
        reuse = Reuse(
            len(token_ids),
            report.num_reused_tokens,
            report.num_recomputed_tokens,
            unscored_chunks=report.unscored_chunks,
        )
        return blended.kv, blended.logits, reuse


def servers(wanted: Sequence[str], timeout_s: float, has_logprobs: bool) -> dict[str, Answerer]:
    """`wanted` are names of the running stack, or `name=address`; all of the stack's when empty.

    Raises `ValueError` for a name that doesn't run and for an address at which nothing answers.
    """
    record = read_record(Home.find())
    running = {
        service.name: service.address
        for service in (record.services if record else ())
        if service.name in STACK_CONTENDERS
    }
    if not wanted and not running:
        raise ValueError(
            "nothing runs; start the stack with ./run-server.sh, or name servers: --contender name=address"
        )
    addresses = dict(_address(given, running) for given in wanted) if wanted else running
    key = shown_api_key()
    return {name: HTTPAnswerer(name, url, key, timeout_s, has_logprobs) for name, url in addresses.items()}


def default_data_dir(engine: str, model: str | None) -> Path:
    """The documents to ask about where nobody names any: the running stack's, or those that go with the model."""
    record = read_record(Home.find()) if engine == "http" else None
    return Path(record.data_dir) if record else find_model(model, "cpu").data_dir


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
    store_bytes = int(store_gb * 2**30)
    return {
        name: BlendAnswerer(name, *shared, config, store_bytes, more_sinks)
        if name == "blend"
        else PlainAnswerer(name, *shared, config.separator)
        for name in wanted or CONTENDERS
    }


def _address(given: str, running: dict[str, str]) -> tuple[str, str]:
    name, _, url = given.partition("=")
    if url:
        return name, url if "://" in url else f"http://{url}"
    if name not in running:
        raise ValueError(
            f"{name} isn't running; running: {', '.join(running) or 'nothing'}. "
            "Start it with ./run-server.sh --contenders, or give its address: --contender name=address"
        )
    return name, running[name]


@dataclass(frozen=True)
class ContenderOptions:
    """Whom to ask. `engine` is `http` (servers) or `hf` (in this process, on `model`); what is None has a default.

    `more_sinks` are to be had beside the model's own; with `hf` only. `store_gb` is for the chunks of each.
    """

    engine: str = "http"
    contenders: Sequence[str] = ()
    model: str | None = None
    separator: str | None = None
    timeout_s: float = 120.0
    has_logprobs: bool = True
    store_gb: float = 2.0
    more_sinks: Sequence[int] = ()

    def find(self) -> dict[str, Answerer]:
        """Raises `ValueError` or `OSError` for what isn't there."""
        if self.engine == "hf":
            return engines(self.contenders, self.model, self.separator, self.store_gb, self.more_sinks)
        if self.engine != "http":
            raise ValueError(f"engine is {self.engine!r}; it is http or hf")
        if self.model:
            raise ValueError("servers have a model already; --model goes with --engine hf")
        if self.more_sinks:
            raise ValueError("a server has the sink it was started with (SINK_TOKENS); other ones go with --engine hf")
        return servers(self.contenders, self.timeout_s, self.has_logprobs)


@dataclass(frozen=True)
class Session:
    """`separator` goes between the chunks of every contender's prompts."""

    answerers: Mapping[str, Answerer]
    separator: str
    console: Console

    def variants(self, policies: Sequence[str], ratios: Sequence[float], check_layers: Sequence[int]) -> list[Variant]:
        """All choices for those that blend, one variant for those that don't; full prefill is always among them."""
        variants: list[Variant] = []
        for answerer in self.answerers.values():
            blends = blend_variants(answerer.name, policies, ratios, check_layers) if answerer.is_blend else None
            variants += blends or [Variant(answerer.name)]
        blend = next((answerer.name for answerer in self.answerers.values() if answerer.is_blend), None)
        if blend and find_reference(variants) is None:
            variants.insert(0, Variant(blend, "all"))
        return variants

    def warm(self, question_set: QuestionSet, variants: Sequence[Variant]) -> None:
        """Whatever these variants reuse. Raises `ValueError` when a chunk can't be had ready."""
        reading = {own.contender for own in variants if reads_scores(own.policy)}
        blends = [answerer for answerer in self.answerers.values() if answerer.is_blend]
        with progress(len(blends) * len(question_set.chunks), self.console, "warming") as advance:
            for answerer in blends:
                try:
                    answerer.warm(question_set.chunks, self.separator, advance)
                except NoAnswer as error:
                    raise ValueError(f"{answerer.name}: {error}") from error
        for answerer in blends:
            if answerer.name in reading:
                self._score(answerer, question_set)

    def _score(self, answerer: Answerer, question_set: QuestionSet) -> None:
        with counted_progress(self.console, "scoring") as on_prompt:
            try:
                answerer.score(question_set.chunks, self.separator, on_prompt)
            except NoAnswer as error:
                raise ValueError(f"{answerer.name}: {error}") from error

    def ask(
        self,
        question_set: QuestionSet,
        variants: Sequence[Variant],
        max_tokens: int,
        reference: Variant | None,
        compares_only: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> tuple[list[Attempt], bool]:
        """What came of it, and whether it was interrupted. Says at the first question when full prefill doesn't end."""
        attempts: list[Attempt] = []
        asking = Asking(self.separator, max_tokens, reference, compares_only)
        num_questions = len(question_set.questions if numbers is None else numbers)
        with progress(len(variants) * num_questions, self.console, "asking") as advance:

            def on_attempt(attempt: Attempt) -> None:
                attempts.append(attempt)
                advance()
                if len(attempts) == 1 and reference and attempt.answer and not attempt.answer.is_complete:
                    self.console.print(cut_note(reference, max_tokens), soft_wrap=True)

            try:
                ask_all(question_set, variants, self.answerers, asking, on_attempt, numbers)
            except KeyboardInterrupt:
                return attempts, True
        return attempts, False


def reuses_nothing(attempts: Sequence[Attempt]) -> bool:
    """Whether blends were asked, and no token came from a chunk: all figures are full prefill's."""
    reuses = [one.answer.reuse for one in attempts if one.variant.policy and one.answer and one.answer.reuse]
    return bool(reuses) and not any(reuse.num_reused_tokens + reuse.num_recomputed_tokens for reuse in reuses)


def nothing_reused_note(separator: str) -> str:
    return (
        "No chunk was found again in a prompt, so nothing was reused and nothing compared: "
        f"the separator {separator!r} may have other tokens between these texts, or the chunks may be too short. "
        "--separator takes another one."
    )


def cut_note(reference: Variant, max_tokens: int) -> str:
    return (
        f"The first answer of {reference.label} doesn't end within {max_tokens} tokens. "
        "Answers that are cut are scored and compared as far as they go; --max-tokens allows longer ones."
    )


@contextmanager
def session(wanted: ContenderOptions, console: Console) -> Iterator[Session]:
    with console.status("Looking for the contenders ..."):
        answerers = wanted.find()
    blends_first = sorted(answerers.values(), key=lambda answerer: not answerer.is_blend)
    known = [wanted.separator, *(answerer.separator for answerer in blends_first)]
    separator = next((given for given in known if given is not None), FALLBACK_SEPARATOR)
    try:
        yield Session(answerers, separator, console)
    finally:
        for answerer in answerers.values():
            answerer.close()
