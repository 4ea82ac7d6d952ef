"""Three demonstrations of reuse between similar tasks, on questions on chunks: no printing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvarena.bench.quality.questions import EvalQuestion, Exam
from kvarena.bench.simllm.contenders import Contender, Network, Setup, TaskAnswer
from kvarena.bench.simllm.running import Asking, warm_up
from kvarena.bench.simllm.stream import is_answered_by
from kvarena.simllm import LSHIndex

UNRELATED = {"unrelated": "What is machine learning?", "its twin": "Explain machine learning."}


@dataclass(frozen=True)
class Step:
    """A prompt of a demonstration, and what it is to the one before."""

    name: str
    question: EvalQuestion


@dataclass(frozen=True)
class ShownAnswer:
    """One step with reuse beside the same without."""

    step: Step
    answer: TaskAnswer
    without_reuse: TaskAnswer


@dataclass(frozen=True)
class Compared:
    """Questions by name, their prompts' cosines `(N, N)`, and in how many bits their hashes differ."""

    questions: Mapping[str, str]
    cosines: torch.Tensor
    num_differing_bits: Sequence[Sequence[int]]
    num_hyperplanes: int


def steps(exam: Exam) -> list[Step]:
    """The first question of the exam, itself again, and two near twins."""
    first = exam.questions[0]
    half = len(first.chunks) // 2
    reordered = (*first.chunks[half:], *first.chunks[:half])
    others = (one for one in exam.questions[1:] if is_answered_by(one, first.chunks))
    return [
        Step("a question", first),
        Step("the same again", first),
        Step("another question", replace(next(others, first), chunks=first.chunks)),
        Step("notes reordered", replace(first, chunks=reordered)),
    ]


def run_steps(network: Network, exam: Exam, setup: Setup, asking: Asking) -> list[ShownAnswer]:
    """In order, by one engine with reuse and one without."""
    contenders = [network.contender(one, asking.max_cache_size) for one in (setup, Setup())]
    try:
        for contender in contenders:
            warm_up(contender, network, asking)
        return [_shown(network, step, contenders, asking) for step in steps(exam)]
    finally:
        for contender in contenders:
            contender.engine.close()


def compare(network: Network, exam: Exam, separator: str, num_hyperplanes: int = 16) -> Compared:
    """Prompts of the exam that share their chunks, others, and two that have nothing to do with them."""
    first, _, *twins = steps(exam)
    shared = set(first.question.chunks)
    elsewhere = min(exam.questions, key=lambda question: len(shared & set(question.chunks)))
    asked = {one.name: one.question for one in (first, *twins, Step("other notes", elsewhere))}
    chats = {name: question.messages(exam.system, separator) for name, question in asked.items()}
    chats |= {name: [{"role": "user", "content": text}] for name, text in UNRELATED.items()}
    embeddings = torch.stack([_embedding(network, network.token_ids(chat)) for chat in chats.values()])
    hashes = LSHIndex(embeddings.shape[1], num_hyperplanes).compute_hash_batch(embeddings)
    questions = {name: question.question for name, question in asked.items()} | UNRELATED
    return Compared(questions, cosines(embeddings), differing_bits(hashes), num_hyperplanes)


def cosines(embeddings: torch.Tensor) -> torch.Tensor:
    """Of each of the embeddings `(N, E)` with each, `(N, N)`."""
    units = torch.nn.functional.normalize(embeddings.double(), dim=1)
    return units @ units.T


def differing_bits(hashes: Sequence[str]) -> list[list[int]]:
    """Hamming distances of hashes of 0 and 1."""
    return [[(int(one, 2) ^ int(other, 2)).bit_count() for other in hashes] for one in hashes]


def _shown(network: Network, step: Step, contenders: Sequence[Contender], asking: Asking) -> ShownAnswer:
    prompt = network.token_ids(step.question.messages(asking.system, asking.separator))
    answers = [contender.answer(prompt, asking.max_new_tokens) for contender in contenders]
    return ShownAnswer(step, *answers)


@torch.inference_mode()
def _embedding(network: Network, token_ids: Sequence[int]) -> torch.Tensor:
    model = network.module.model
    embedding: torch.Tensor = model.task_embedding(torch.tensor(token_ids, device=network.module.device))
    return embedding.cpu()
