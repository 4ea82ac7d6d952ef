"""A stream of tasks put to engines over the same weights in turn: one without reuse, others with a mode and threshold.

In turn, request by request, so that a slower minute of the machine meets all. A chosen share of the stream is
similar to an earlier task: questions on chunks, as in a RAG system.

| task | its context | its question |
|---|---|---|
| new | chunks of a question of the set; those of every second new task in another order | another one of the set |
| same context | an earlier new task's chunks, in the same order | that question of the set, as it is there |
| other order | an earlier new task's chunks, which stood there in another order | that question, as it is there |

No two new tasks have the same set of chunks while the questions have more. With half of the tasks similar, every new
task has one that is similar to it. Where there are more, further ones ask other questions on the same chunks, again
in the same or in another order. A question is only put on chunks that its gold answers hold for.
"""

from __future__ import annotations

import copy
import random
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from time import perf_counter, process_time
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from kvarena.bench.memory import PeakMemory
from kvarena.bench.quality.questions import EvalQuestion, QuestionSet
from kvarena.bench.results import NO_REUSE
from kvarena.contenders.simllm.engine import SimLLMEngine, SimLLMOptions
from kvarena.contenders.simllm.inference import load_llama
from kvarena.contenders.simllm.params import checked_threshold
from kvarena.documents import TextChunk
from kvarena.engines.base import GenerationRequest, Report, Sampling
from kvarena.engines.vllm.config import BlendConfig
from kvarena.model import find_model
from kvarena.policies.params import read_blend_profile
from kvarena.simllm import AlignedParams, SimLLMInference, SimLLMParams


@dataclass(frozen=True)
class SimLLMVariant:
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
class MeasuredAnswer:
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

    variant: SimLLMVariant
    engine: SimLLMEngine
    _memory: PeakMemory = field(default_factory=PeakMemory)

    def answer(self, prompt: Sequence[int], num_steps: int) -> MeasuredAnswer:
        """So many tokens are generated, also where the answer ends earlier."""
        sampling = Sampling(max_tokens=num_steps, temperature=0.0, ignore_eos=True)
        options = SimLLMOptions(reuse=self.variant.mode is not None)
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
        return MeasuredAnswer(
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
class SharedModel:
    """A Llama that contenders share, and what goes with it. `has_random_weights`: its answers mean nothing."""

    name: str
    module: Any
    tokenizer: Any
    config: BlendConfig
    has_random_weights: bool

    @classmethod
    def load(
        cls, folder: str, name: str, *, device: str = "auto", dtype: str = "auto", random: bool = False
    ) -> SharedModel:
        """As `load_llama`."""
        module = load_llama(folder, device=device, dtype=dtype, random=random)
        profile = BlendConfig(**read_blend_profile(folder))
        return cls(name, module, AutoTokenizer.from_pretrained(folder), profile, random)

    @classmethod
    def find(cls, model: str | None, *, device: str = "auto", dtype: str | None = None) -> SharedModel:
        """A trained model as `kvarena.stack` finds it, by default the town model; `dtype` None is the machine's best.

        Raises `StackError` for a folder that isn't there.
        """
        found = find_model(model, "cpu")
        return cls.load(found.name, found.served_name, device=device, dtype=dtype or best_dtype())

    def contender(self, variant: SimLLMVariant, asking: StreamSettings) -> Contender:
        """With a manager of its own, which hangs on a copy of the model's modules; their weights are the same ones."""
        params = replace(
            variant.params,
            max_cache_size=asking.max_cache_size,
            num_hyperplanes=asking.num_hyperplanes,
            aligned=AlignedParams(blend=self.config.params),
        )
        shared = [*self.module.parameters(), *self.module.buffers()]
        twin = copy.deepcopy(self.module, {id(tensor): tensor for tensor in shared})
        return Contender(variant, SimLLMEngine(SimLLMInference(twin, self.tokenizer, params), self.name))

    def token_ids(self, messages: Sequence[Any]) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids


def best_dtype() -> str:
    """Few CPUs have bfloat16 instructions; without them float32 is several times faster. "auto" is the checkpoint's."""
    return "auto" if torch.cuda.is_available() else "float32"


def variants(modes: Sequence[str], thresholds: Sequence[float]) -> list[SimLLMVariant]:
    """The one without reuse first. Raises `ValueError` naming a mode or threshold that can't be chosen."""
    chosen = [SimLLMVariant(mode, threshold) for mode in modes for threshold in thresholds]
    for variant in chosen:
        _ = variant.params
    return [SimLLMVariant(), *dict.fromkeys(chosen)]


TaskKind = Literal["new", "same context", "other order"]
Context = tuple[TextChunk, ...]


@dataclass(frozen=True)
class StreamTask:
    """`question.chunks` is the context. `earlier` is the place in the stream of the task that it is similar to."""

    question: EvalQuestion
    kind: TaskKind
    earlier: int | None = None


@dataclass(frozen=True)
class _Topic:
    """A new task that later ones may be similar to, and the question that its chunks were taken from."""

    place: int
    context: Context
    planned: EvalQuestion
    kind: TaskKind


def make_stream(question_set: QuestionSet, num_tasks: int, similar_ratio: float, seed: int = 0) -> list[StreamTask]:
    """Equal arguments make equal streams. Raises `ValueError` for a stream without tasks and a share that is none."""
    if num_tasks < 1:
        raise ValueError(f"a stream has 1 task or more, not {num_tasks}")
    if not 0 <= similar_ratio <= 1:
        raise ValueError(f"the share of similar tasks must be from 0 to 1, not {similar_ratio}")
    return _StreamMaker(question_set, random.Random(seed)).make(
        num_tasks, min(round(num_tasks * similar_ratio), num_tasks - 1)
    )


class _StreamMaker:
    def __init__(self, question_set: QuestionSet, rng: random.Random) -> None:
        self._exam, self._rng = question_set, rng
        self._asked = Counter[str]()
        self._tasks: list[StreamTask] = []
        self._fresh: list[_Topic] = []
        self._used: list[_Topic] = []

    def make(self, num_tasks: int, num_similar: int) -> list[StreamTask]:
        """Similar tasks come in between, at chance distances, and while they can each have a new task of its own."""
        planned = self._planned_questions(num_tasks - num_similar)
        while len(self._tasks) < num_tasks:
            num_left = num_tasks - len(self._tasks)
            is_similar = self._rng.random() * num_left >= len(planned)
            if planned and not (is_similar and self._fresh):
                self._add_new(planned.pop())
            else:
                self._add_similar()
        return self._tasks

    def _planned_questions(self, count: int) -> list[EvalQuestion]:
        """In random order; those whose chunks no other has come first."""
        drawn = self._rng.sample(self._exam.questions, len(self._exam.questions))
        firsts = {frozenset(question.chunks): question for question in reversed(drawn)}
        ordered = [*firsts.values(), *(question for question in drawn if question not in firsts.values())]
        return [ordered[number % len(ordered)] for number in range(count)]

    def _add_new(self, planned: EvalQuestion) -> None:
        kind: TaskKind = "other order" if (len(self._fresh) + len(self._used)) % 2 else "same context"
        context = self._reordered(planned.chunks) if kind == "other order" else planned.chunks
        question = self._another(context, planned)
        if question is None:
            kind, question = "same context", planned
        topic = _Topic(len(self._tasks), question.chunks, planned, kind)
        self._fresh.append(topic)
        self._add(StreamTask(question, "new"))

    def _add_similar(self) -> None:
        if self._fresh:
            topic = self._fresh.pop(self._rng.randrange(len(self._fresh)))
            self._used.append(topic)
            question: EvalQuestion | None = topic.planned
        else:
            topic = self._rng.choice(self._used)
            context = self._reordered(topic.context) if topic.kind == "other order" else topic.context
            question = self._another(context, self._tasks[topic.place].question)
        self._add(StreamTask(question or topic.planned, topic.kind, topic.place))

    def _add(self, task: StreamTask) -> None:
        self._tasks.append(task)
        self._asked[task.question.question] += 1

    def _another(self, context: Context, than: EvalQuestion) -> EvalQuestion | None:
        """A question that this context answers, of those that were asked least; on this context."""
        others = [
            question
            for question in self._exam.questions
            if question.question != than.question and is_answered_by(question, context)
        ]
        self._rng.shuffle(others)
        least = min(others, key=lambda question: self._asked[question.question], default=None)
        return least and replace(least, chunks=context)

    def _reordered(self, context: Context) -> Context:
        if len(context) < 2:
            return context
        while (mixed := tuple(self._rng.sample(context, len(context)))) == context:
            pass
        return mixed


def is_answered_by(question: EvalQuestion, context: Sequence[TextChunk]) -> bool:
    """Whether the gold answers hold on this context: from the first chunk that the question needs to the last one, its
    chunks must stand there unbroken, for what "the same person" is depends on what stands before. Where a question
    doesn't say what it needs, that is all of its chunks.
    """
    own, names = [chunk.name for chunk in question.chunks], [chunk.name for chunk in context]
    needed = sorted(own.index(name) for name in question.needs) or [0, len(own) - 1]
    stretch = own[needed[0] : needed[-1] + 1]
    return any(names[start : start + len(stretch)] == stretch for start in range(len(names)))


WARM_UP = "Say something, so that all memory is there."


@dataclass(frozen=True)
class StreamSettings:
    """How a stream is put. All answers take `max_new_tokens` steps, so that answers of all lengths cost the same."""

    system: str
    separator: str
    max_new_tokens: int = 8
    max_cache_size: int = 100
    num_hyperplanes: int = 16


@dataclass(frozen=True)
class ContenderRun:
    """`answers` are in the stream's order; `task_bytes` is the KV kept of tasks after the last one."""

    variant: SimLLMVariant
    answers: Sequence[MeasuredAnswer]
    task_bytes: int


def run_stream(
    network: SharedModel,
    tasks: Sequence[StreamTask],
    variants: Sequence[SimLLMVariant],
    asking: StreamSettings,
    on_step: Callable[[], None] = lambda: None,
) -> list[ContenderRun]:
    """A run for each variant. Raises `ValueError` for a prompt that has no room in the model's context."""
    contenders = [network.contender(variant, asking) for variant in variants]
    answers: list[list[MeasuredAnswer]] = [[] for _ in contenders]
    try:
        for contender in contenders:
            warm_up(contender, network, asking)
        for number, task in enumerate(tasks):
            prompt = network.token_ids(task.question.messages(asking.system, asking.separator))
            for place in _in_turn(len(contenders), number):
                answers[place].append(contenders[place].answer(prompt, asking.max_new_tokens))
                on_step()
        return [
            ContenderRun(contender.variant, given, contender.task_bytes)
            for contender, given in zip(contenders, answers, strict=True)
        ]
    finally:
        for contender in contenders:
            contender.engine.close()


def warm_up(contender: Contender, network: SharedModel, asking: StreamSettings) -> None:
    """One answer that nothing remembers."""
    contender.answer(network.token_ids([{"role": "user", "content": WARM_UP}]), asking.max_new_tokens)
    contender.engine.simllm.reset_cache()


def _in_turn(count: int, number: int) -> list[int]:
    """Places 0 to count - 1, another one first each time."""
    return [(place + number) % count for place in range(count)]
