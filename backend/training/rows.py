"""Training rows: a town's chunks as context, followed by branches with questions and answers.

    <s>system<user><note>chunk<note>chunk<note>      |  question<assistant>answer</s>[<user>follow-up<assistant>...]
    context, padded to `context_tokens`              |  branches, together padded to `branch_tokens`

Every branch goes on at the context's end: its positions start there, and it sees the context and itself. `Batches`
makes rows ahead of time.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizer import ASSISTANT_ID, BOS_ID, EOS_ID, PAD_ID, USER_ID
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvarena.documents import join_chunks
from kvarena.synthetic_qa import questions as chat
from kvarena.synthetic_qa.facts import Chunk, chunk_text
from kvarena.synthetic_qa.questions import Question, Quiz
from kvarena.synthetic_qa.town import TownShape, write_town
from settings import STAGES, Mix, RowShape

KINDS = (
    "single", "same_person", "same_shop", "same_street", "same_day", "nickname", "unanswerable", "followup", "history"
)  # fmt: skip
_TURN_TOKENS = 12
TokenRow = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """`targets` (B, T) are the next tokens, `labels` (B, T) what kind of target: -1 none, 0 context, 1 + kind."""

    ids: Tensor
    positions: Tensor
    targets: Tensor
    labels: Tensor
    branch_mask: Tensor

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int((self.ids != PAD_ID).sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


class TextCoder:
    """Token ids of texts that stand alone between special tokens; the same few sentences come again and again."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self.encode = lru_cache(50_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def context(self, system: str, texts: Sequence[str], separator: str) -> list[int]:
        """Everything before the first question, which then tokenises as if it stood alone (but see `question`)."""
        shared = join_chunks(texts, separator)
        return [BOS_ID, *self._encode(system), USER_ID, *self._encode(shared.rstrip(" "))]

    def question(self, text: str, separator: str) -> tuple[int, ...]:
        """The first question: after nothing at all its first word lacks the space it has elsewhere."""
        return self.encode(f".{text}")[len(self.encode(".")) :] if separator == "" else self.encode(text)

    def branch(self, question: Question, separator: str) -> tuple[list[int], list[int]]:
        """Token ids and their labels."""
        ids: list[int] = []
        labels: list[int] = []
        for index, turn in enumerate(question.turns):
            asked = (USER_ID, *self.encode(turn.question)) if index else self.question(turn.question, separator)
            answer = (*self.encode(turn.answer), EOS_ID)
            ids += [*asked, ASSISTANT_ID, *answer]
            kind = kind_name(question) if index == len(question.history) else "history"
            labels += [0] * (len(asked) + 1) + [1 + KINDS.index(kind)] * len(answer)
        return ids, labels


def make_batch(coder: TextCoder, shape: RowShape, mix: Mix, rng: random.Random) -> Batch:
    start, end = shape.context_tokens, shape.context_tokens + shape.branch_tokens
    ids = np.full((shape.num_rows, end), PAD_ID, np.int64)
    targets, positions = ids.copy(), np.zeros_like(ids)
    labels, branches = np.full_like(ids, -1), np.full_like(ids, -1)
    for row in range(shape.num_rows):
        _fill_row(coder, shape, mix, rng, ids[row], positions[row], targets[row], labels[row], branches[row])
    own = (branches[:, start:, None] == branches[:, None, :]) & np.tri(end - start, end, start, dtype=bool)
    seen = own | (branches[:, None, :] == 0)
    return Batch(*(torch.from_numpy(array) for array in (ids, positions, targets, labels, seen[:, None])))


def _fill_row(
    coder: TextCoder,
    shape: RowShape,
    mix: Mix,
    rng: random.Random,
    ids: TokenRow,
    positions: TokenRow,
    targets: TokenRow,
    labels: TokenRow,
    branches: TokenRow,
) -> None:
    separator = rng.choice(mix.separators) if mix.separators else chat.random_separator(rng)
    chunks, context = _context(coder, shape, mix, rng, separator)
    n = len(context)
    ids[:n], positions[:n], branches[:n] = context, np.arange(n), 0
    targets[: n - 1], labels[: n - 1] = context[1:], 0
    at = shape.context_tokens
    asked = pick_questions(Quiz(chunks, rng, mix.num_wordings), mix, shape.branch_tokens // _TURN_TOKENS, rng)
    for number, question in enumerate(asked, 1):
        branch, branch_labels = coder.branch(question, separator)
        end = at + len(branch)
        if end > len(ids):
            break
        ids[at:end], positions[at:end], branches[at:end] = branch, n + np.arange(end - at), number
        targets[at : end - 1] = branch[1:]
        labels[at : end - 1] = branch_labels[1:]
        at = end


def _context(
    coder: TextCoder, shape: RowShape, mix: Mix, rng: random.Random, separator: str
) -> tuple[list[Chunk], list[int]]:
    """As many chunks of a new town as fit; the last one ends early."""
    system = chat.SYSTEM_PROMPT if mix.has_usual_system else chat.random_system_prompt(rng)
    chunk_tokens = min(rng.choice(mix.chunk_tokens), shape.context_tokens // 3)
    town = TownShape(
        num_chunks=max(2, round(1.1 * shape.context_tokens / chunk_tokens)),
        chunk_tokens=chunk_tokens,
        num_relations=rng.choice(mix.num_relations),
        across_ratio=mix.across_ratio,
        links=mix.links,
        num_wordings=mix.num_wordings,
    )
    chunks = write_town(rng, town)
    if rng.random() < mix.shuffle_ratio:
        rng.shuffle(chunks)
    while len(ids := coder.context(system, [chunk_text(chunk) for chunk in chunks], separator)) > shape.context_tokens:
        chunks[-1] = chunks[-1][:-1]
        if not chunks[-1]:
            chunks.pop()
    return chunks, ids


def pick_questions(quiz: Quiz, mix: Mix, count: int, rng: random.Random) -> list[Question]:
    """About `count` turns in random order; across chunks more often than they come."""
    num_unanswerable, num_followups = round(count * mix.unanswerable_ratio), round(count * mix.followup_ratio / 2)
    special = quiz.unanswerable(num_unanswerable) + quiz.followups(num_followups)
    weights = {"single": 1.0, "across": mix.across_weight}
    facts = quiz.all_facts()
    facts.sort(key=lambda asked: rng.random() ** (1 / weights[asked.kind]), reverse=True)
    picked = facts[: max(0, count - len(special))] + special
    rng.shuffle(picked)
    return picked


def kind_name(question: Question) -> str:
    return question.detail if question.kind == "across" else question.kind


_coder: TextCoder | None = None


class Batches:
    """Batches made ahead in worker processes. What a step gets depends on the seed, the step and the stage alone.

    `num_workers` processes, each two batches ahead; with 0, batches are made where they are asked for.
    """

    def __init__(self, tokenizer_folder: Path, seed: int, num_workers: int) -> None:
        self._seed, self._ahead = seed, 2 * num_workers
        self._tokenizer_folder = tokenizer_folder
        self._pool = (
            ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (tokenizer_folder,))
            if num_workers
            else None
        )
        self._made: dict[tuple[int, int], Future[Batch]] = {}

    def get(self, step: int, stage: int) -> Batch:
        if self._pool is None:
            if _coder is None:
                _load_coder(self._tokenizer_folder)
            return _make(self._seed, step, stage)
        for ahead in range(step, step + self._ahead + 1):
            if (ahead, stage) not in self._made:
                self._made[ahead, stage] = self._pool.submit(_make, self._seed, ahead, stage)
        batch = self._made[step, stage].result()
        self._made = {key: future for key, future in self._made.items() if key[0] > step}
        return batch

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(tokenizer_folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _load_coder(tokenizer_folder)


def _load_coder(tokenizer_folder: Path) -> None:
    global _coder
    _coder = TextCoder(PreTrainedTokenizerFast.from_pretrained(tokenizer_folder))


def _make(seed: int, step: int, stage: int) -> Batch:
    assert _coder is not None
    rng = random.Random(f"{seed} {step}")
    return make_batch(_coder, STAGES[stage].pick_shape(rng), STAGES[stage].mix, rng)
