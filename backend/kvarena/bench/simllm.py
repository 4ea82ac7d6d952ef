"""`kvarena bench simllm`: one stream of tasks put to engines over the same weights, with reuse and without.

The engines take turns, request by request, so that a slower minute of the machine meets all of them: one without reuse,
the others with a mode and a threshold each. Speed is measured on random weights of a real size, quality on a trained
model. A chosen share of the tasks is similar to an earlier one: questions on chunks, as in a RAG system.

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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from time import process_time
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import AutoTokenizer

from kvarena.bench.console import Column, percent, percent_range, table_of
from kvarena.bench.measure import PeakMemory, in_turn, timed
from kvarena.bench.quality.questions import EvalQuestion, QuestionSet
from kvarena.bench.quality.scoring import is_same_answer, squad_score
from kvarena.bench.results import DIGITS, Row, mean_interval, spread
from kvarena.bench.shapes import model_folder
from kvarena.contenders.simllm.engine import SimLLMEngine, SimLLMOptions
from kvarena.contenders.simllm.inference import load_llama
from kvarena.contenders.simllm.params import checked_threshold
from kvarena.documents import TextChunk
from kvarena.engines.base import Report
from kvarena.engines.vllm.config import BlendConfig
from kvarena.model import find_model
from kvarena.panels.panel import NO_REUSE
from kvarena.policies.params import read_blend_profile
from kvarena.simllm import AlignedParams, SimLLMInference, SimLLMParams

WARM_UP = "Say something, so that all memory is there."


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
        """Generates so many tokens, even past the end of the answer."""
        self._memory.start()
        cpu_s = process_time()
        answer = timed(self.engine, prompt, num_steps, options=SimLLMOptions(reuse=self.variant.mode is not None))
        cpu_ms = 1000 * (process_time() - cpu_s)
        token_ids = tuple(takewhile(lambda token_id: token_id not in self.engine.model.eos_token_ids, answer.token_ids))
        return MeasuredAnswer(
            token_ids,
            self.engine.tokenizer.decode(token_ids, skip_special_tokens=True),
            answer.first_token_ms,
            answer.total_ms,
            cpu_ms,
            self._memory.rise_bytes(),
            answer.report,
        )

    @property
    def task_bytes(self) -> int:
        """KV kept of tasks."""
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
        """With a manager of its own, on a copy of the model's modules that shares their weights."""
        params = replace(
            variant.params,
            max_cache_size=asking.max_cache_size,
            num_hyperplanes=asking.num_hyperplanes,
            aligned=AlignedParams(blend=self.config.params),
        )
        shared = [*self.module.parameters(), *self.module.buffers()]
        twin = copy.deepcopy(self.module, {id(tensor): tensor for tensor in shared})
        return Contender(variant, SimLLMEngine(SimLLMInference(twin, self.tokenizer, params), self.name))

    @contextmanager
    def contenders(self, variants: Sequence[SimLLMVariant], asking: StreamSettings) -> Iterator[list[Contender]]:
        """Warmed up by an answer that nothing remembers, and closed at the end of the block."""
        contenders = [self.contender(variant, asking) for variant in variants]
        try:
            for contender in contenders:
                contender.answer(self.token_ids([{"role": "user", "content": WARM_UP}]), asking.max_new_tokens)
                contender.engine.simllm.reset_cache()
            yield contenders
        finally:
            for contender in contenders:
                contender.engine.close()

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
ORDERS: tuple[TaskKind, TaskKind] = ("same context", "other order")
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
    """Similar tasks come in between, at random distances; as long as possible each has a new task of its own.

    Equal arguments make equal streams. Raises `ValueError` for a stream without tasks and a share that is none.
    """
    if num_tasks < 1:
        raise ValueError(f"a stream has 1 task or more, not {num_tasks}")
    if not 0 <= similar_ratio <= 1:
        raise ValueError(f"the share of similar tasks must be from 0 to 1, not {similar_ratio}")
    rng, asked = random.Random(seed), Counter[str]()
    num_similar = min(round(num_tasks * similar_ratio), num_tasks - 1)
    planned = _planned_questions(question_set, num_tasks - num_similar, rng)
    tasks: list[StreamTask] = []
    fresh: list[_Topic] = []
    used: list[_Topic] = []

    def another(context: Context, than: EvalQuestion) -> EvalQuestion | None:
        """A question that this context answers, of those that were asked least; on this context."""
        others = [
            question
            for question in question_set.questions
            if question.question != than.question and is_answered_by(question, context)
        ]
        rng.shuffle(others)
        least = min(others, key=lambda question: asked[question.question], default=None)
        return least and replace(least, chunks=context)

    def in_order(context: Context, kind: TaskKind) -> Context:
        return _reordered(context, rng) if kind == "other order" else context

    while len(tasks) < num_tasks:
        is_similar = rng.random() * (num_tasks - len(tasks)) >= len(planned)
        if planned and not (is_similar and fresh):
            plan, kind = planned.pop(), ORDERS[(len(fresh) + len(used)) % 2]
            question = another(in_order(plan.chunks, kind), plan)
            topic = _Topic(len(tasks), (question or plan).chunks, plan, kind if question else "same context")
            fresh.append(topic)
            tasks.append(StreamTask(question or plan, "new"))
        elif fresh:
            used.append(fresh.pop(rng.randrange(len(fresh))))
            tasks.append(StreamTask(used[-1].planned, used[-1].kind, used[-1].place))
        else:
            topic = rng.choice(used)
            question = another(in_order(topic.context, topic.kind), tasks[topic.place].question)
            tasks.append(StreamTask(question or topic.planned, topic.kind, topic.place))
        asked[tasks[-1].question.question] += 1
    return tasks


def _planned_questions(question_set: QuestionSet, count: int, rng: random.Random) -> list[EvalQuestion]:
    """In random order; those whose chunks no other has come first."""
    drawn = rng.sample(question_set.questions, len(question_set.questions))
    firsts = {frozenset(question.chunks): question for question in reversed(drawn)}
    ordered = [*firsts.values(), *(question for question in drawn if question not in firsts.values())]
    return [ordered[number % len(ordered)] for number in range(count)]


def _reordered(context: Context, rng: random.Random) -> Context:
    if len(context) < 2:
        return context
    while (mixed := tuple(rng.sample(context, len(context)))) == context:
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
    with network.contenders(variants, asking) as contenders:
        answers: list[list[MeasuredAnswer]] = [[] for _ in contenders]
        for number, task in enumerate(tasks):
            prompt = network.token_ids(task.question.messages(asking.system, asking.separator))
            for contender, given in in_turn(list(zip(contenders, answers, strict=True)), number):
                given.append(contender.answer(prompt, asking.max_new_tokens))
                on_step()
        return [
            ContenderRun(contender.variant, given, contender.task_bytes)
            for contender, given in zip(contenders, answers, strict=True)
        ]


def make_rows(tasks: Sequence[StreamTask], runs: Sequence[ContenderRun], **model: Any) -> list[Row]:
    """The first run is the one without reuse: what the others are compared with."""
    reference = runs[0]
    assert reference.variant.mode is None, "the first run is without reuse"
    return [
        {
            **model,
            "mode": run.variant.mode,
            "similarity_threshold": run.variant.similarity_threshold,
            "num_tasks": len(tasks),
            "num_similar": sum(task.earlier is not None for task in tasks),
            **_reuse(tasks, run),
            **_speed(tasks, run, reference),
            **_quality(tasks, run, reference),
        }
        for run in runs
    ]


def answer_rows(tasks: Sequence[StreamTask], runs: Sequence[ContenderRun], **model: Any) -> list[Row]:
    """Every single answer, for readers."""
    return [
        {
            **model,
            "contender": run.variant.label,
            "task": number,
            "kind": task.kind,
            "earlier": task.earlier,
            "question": task.question.question,
            "text": answer.text,
            "gold": list(task.question.answers),
            "is_hit": answer.report.details["hit"],
            "similarity": answer.report.details["similarity"],
            "num_prompt_tokens": answer.report.num_prompt_tokens,
            "num_layer_passes": answer.report.details["num_layer_passes"],
            "ttft_ms": round(answer.first_token_ms, 2),
            "total_ms": round(answer.total_ms, 2),
        }
        for run in runs
        for number, (task, answer) in enumerate(zip(tasks, run.answers, strict=True))
    ]


def _reuse(tasks: Sequence[StreamTask], run: ContenderRun) -> Row:
    """`layer_pass_ratio`: layer passes over prompt tokens, of those without reuse. Hits of new tasks count as well."""
    details = [answer.report.details for answer in run.answers]
    pairs = zip(tasks, details, strict=True)
    passes = sum(detail["num_layer_passes"] for detail in details)
    return {
        "num_hits": sum(detail["hit"] for detail in details),
        "num_similar_hits": sum(detail["hit"] for task, detail in pairs if task.earlier is not None),
        "layer_pass_ratio": round(passes / sum(detail["num_layer_passes_without_reuse"] for detail in details), DIGITS),
        "task_bytes": run.task_bytes,
    }


def _speed(tasks: Sequence[StreamTask], run: ContenderRun, reference: ContenderRun) -> Row:
    """Requests come one after the other, so throughput is their number by the sum of their times."""
    total_s, reference_s = (sum(answer.total_ms for answer in one.answers) / 1000 for one in (run, reference))
    cpu_s, reference_cpu_s = (sum(answer.cpu_ms for answer in one.answers) / 1000 for one in (run, reference))
    by_kind = {
        kind: [answer.first_token_ms for task, answer in zip(tasks, run.answers, strict=True) if task.kind == kind]
        for kind in dict.fromkeys(task.kind for task in tasks)
    }
    rises = [answer.peak_rise_bytes for answer in run.answers if answer.peak_rise_bytes is not None]
    return {
        "throughput_per_s": round(len(tasks) / total_s, DIGITS),
        "throughput_vs_no_reuse": round(reference_s / total_s, DIGITS),
        "throughput_vs_no_reuse_by_cpu_time": round(reference_cpu_s / cpu_s, DIGITS),
        "ttft_ms": spread([answer.first_token_ms for answer in run.answers]),
        "ttft_ms_by_kind": {kind: spread(times_ms) for kind, times_ms in by_kind.items()},
        "peak_rise_bytes": max(rises, default=None),
    }


def _quality(tasks: Sequence[StreamTask], run: ContenderRun, reference: ContenderRun) -> Row:
    """Interval of each figure from 0 to 1. Answers of random weights match nothing, but can agree."""
    exact, full = (
        [
            squad_score(answer.text, task.question.answers).exact_match
            for task, answer in zip(tasks, one.answers, strict=True)
        ]
        for one in (run, reference)
    )
    pairs = list(zip(run.answers, reference.answers, strict=True))
    similar = [score for task, score in zip(tasks, exact, strict=True) if task.earlier is not None]
    return {
        "exact_match": mean_interval(exact),
        "similar_exact_match": mean_interval(similar),
        "exact_match_vs_no_reuse": mean_interval([mine - theirs for mine, theirs in zip(exact, full, strict=True)]),
        "agreement": mean_interval([is_same_answer(mine.text, theirs.text) for mine, theirs in pairs]),
        "first_token_agreement": mean_interval(
            [float(mine.token_ids[:1] == theirs.token_ids[:1]) for mine, theirs in pairs]
        ),
    }


MEBI = 2**20


def show_speed(rows: Sequence[Row], console: Console) -> None:
    """Times are in milliseconds, memory in MiB."""
    figures: dict[str, Column] = {
        "hits": "{num_hits}",
        "passes": "{layer_pass_ratio:.0%}",
        "req/s": "{throughput_per_s:.2f}",
        "times": "{throughput_vs_no_reuse:.2f}",
        "CPU": "{throughput_vs_no_reuse_by_cpu_time:.2f}",
        "TTFT": "{ttft_ms[median]:.0f}",
        "p95": "{ttft_ms[p95]:.0f}",
        "rise": lambda row: "-" if row["peak_rise_bytes"] is None else f"{row['peak_rise_bytes'] / MEBI:.0f}",
        "kept": lambda row: f"{row['task_bytes'] / MEBI:.0f}",
    }
    console.print(table_of(f"Speed on {_what(rows)}", rows, {"contender": _label}, figures))
    console.print(
        "passes: layer passes over prompt tokens, of no reuse's; times: requests per second, by no reuse's; CPU: the "
        "same by CPU time; TTFT, p95: ms; rise: the most that a request made memory rise, kept: KV of tasks, MiB",
        style="dim",
    )


def show_quality(rows: Sequence[Row], console: Console) -> None:
    """All figures are percentages; differences to no reuse are in points."""
    figures: dict[str, Column] = {
        "hits": "{num_hits}",
        "exact": lambda row: percent(row["exact_match"]),
        "interval": lambda row: percent_range(row["exact_match"]),
        "lost": lambda row: f"{-100 * row['exact_match_vs_no_reuse']['mean'] + 0.0:.1f}",
        "similar": lambda row: percent(row["similar_exact_match"]),
        "same": lambda row: percent(row["agreement"]),
        "first": lambda row: percent(row["first_token_agreement"]),
    }
    console.print(table_of(f"Quality on {_what(rows)}", rows, {"contender": _label}, figures))
    console.print(
        "exact: exact match; lost: of no reuse's, points; similar: exact match of the similar tasks; same, first: "
        "answers and first tokens that are no reuse's",
        style="dim",
    )


def _what(rows: Sequence[Row]) -> str:
    row = rows[0]
    weights = " (random weights)" if row["has_random_weights"] else ""
    return f"{row['model']}{weights}: {row['num_tasks']} tasks, {row['num_similar']} similar"


def _label(row: Row) -> str:
    return SimLLMVariant(row["mode"], row["similarity_threshold"]).label


Measured = tuple[list[Row], list[Row]]
"""Rows of the contenders, and of their single answers."""


@dataclass(frozen=True)
class Bench:
    """`max_new_tokens` are generated for every answer. `dtype` None is the machine's best."""

    question_set: QuestionSet
    variants: Sequence[SimLLMVariant]
    similar_ratio: float
    max_new_tokens: int = 8
    max_cache_size: int = 100
    dtype: str | None = None
    seed: int = 0
    num_hyperplanes: int = 16
    device: str = "auto"

    def speed(self, shape: str, num_tasks: int, on_step: Callable[[], None]) -> Measured:
        """On random weights. Raises `ValueError` for an unknown shape."""
        torch.manual_seed(self.seed)
        network = SharedModel.load(model_folder(None, shape), shape, dtype=self.dtype or best_dtype(), random=True)
        separator = BlendConfig(**read_blend_profile(model_folder(None, None))).separator
        return self._measure(network, num_tasks, separator, on_step)

    def quality(self, model: str | None, num_tasks: int, on_step: Callable[[], None]) -> Measured:
        """On a trained model, by default the town model."""
        network = SharedModel.find(model, device=self.device, dtype=self.dtype)
        return self._measure(network, num_tasks, network.config.separator, on_step)

    def settings(self) -> dict[str, Any]:
        """As they go into the result file."""
        return {
            "similar_ratio": self.similar_ratio,
            "max_new_tokens": self.max_new_tokens,
            "max_cache_size": self.max_cache_size,
            "dtype": self.dtype or best_dtype(),
            "num_threads": torch.get_num_threads(),
            "seed": self.seed,
        }

    def _measure(self, network: SharedModel, num_tasks: int, separator: str, on_step: Callable[[], None]) -> Measured:
        tasks = make_stream(self.question_set, num_tasks, self.similar_ratio, self.seed)
        kept = (self.max_new_tokens, self.max_cache_size, self.num_hyperplanes)
        asking = StreamSettings(self.question_set.system, separator, *kept)
        runs = run_stream(network, tasks, self.variants, asking, on_step)
        model = {"model": network.name, "has_random_weights": network.has_random_weights}
        return make_rows(tasks, runs, **model), answer_rows(tasks, runs, **model)
