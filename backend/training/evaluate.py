"""Exact match on towns that no training run sees, by kind of question: with full attention and with naive reuse.

An answer is right if every token of it, the end included, is the likeliest one after the gold tokens before it: that
is what greedy decoding finds, at the price of one forward pass for all questions of a town.

Naive reuse computes each chunk alone and moves its keys. Rotary attention depends on distances alone, so that is
the same as a context in which chunks don't see each other.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import lru_cache

import torch
from model import SmallLlama
from rows import KINDS, Batch, TextCoder, make_batch
from tokenizer import NOTE_ID
from torch import Tensor

from kvarena.synthetic_qa.questions import NOTE
from kvarena.synthetic_qa.town import DEFAULT_LINKS
from settings import Mix, RowShape

SEED = "evaluation"
CONTEXTS = {"400": (RowShape(400, 640, 4), 1), "800": (RowShape(800, 768, 4), 1)}
LONG_CONTEXTS = {"2000": (RowShape(2000, 1024, 2), 2), "4000": (RowShape(4000, 1024, 1), 4)}
MIX = Mix((60, 80, 100, 120), (6,), links=DEFAULT_LINKS, separators=(NOTE,), has_usual_system=True, shuffle_ratio=0.0)


def evaluate(
    model: SmallLlama, coder: TextCoder, is_naive: bool = False, is_long: bool = False, times: int = 1
) -> dict[str, dict[str, float]]:
    """Exact match (0 to 1) by context length and kind."""
    contexts = CONTEXTS | (LONG_CONTEXTS if is_long else {})
    with torch.compiler.set_stance("force_eager"):  # compiling for a few batches takes longer than they do
        return {
            name: _exact_match(model, coder, shape, num_batches * times, is_naive)
            for name, (shape, num_batches) in contexts.items()
        }


@torch.no_grad()
def _exact_match(
    model: SmallLlama, coder: TextCoder, shape: RowShape, num_batches: int, is_naive: bool
) -> dict[str, float]:
    asked, right = Counter[str](), Counter[str]()
    device = next(model.parameters()).device
    for number in range(num_batches):
        batch = _batch(coder, shape, number).to(device)
        mask = chunks_alone_mask(batch.ids[:, : shape.context_tokens]) if is_naive else None
        answers = batch.labels > 0
        hidden = model(batch.ids, batch.positions, batch.branch_mask, mask)
        is_right = torch.zeros_like(answers)
        is_right[answers] = model.logits(hidden[answers]).argmax(-1) == batch.targets[answers]
        for kind, answer_is_right in _answers(batch.labels.cpu(), is_right.cpu()):
            asked[kind] += 1
            right[kind] += answer_is_right
    groups = {"across": [kind for kind in asked if kind.startswith("same_") or kind == "nickname"]}
    groups |= {kind: [kind] for kind in asked if kind != "history"}
    return {
        name: round(sum(right[kind] for kind in kinds) / sum(asked[kind] for kind in kinds), 4)
        for name, kinds in groups.items()
        if kinds
    }


@lru_cache(16)
def _batch(coder: TextCoder, shape: RowShape, number: int) -> Batch:
    return make_batch(coder, shape, MIX, random.Random(f"{SEED} {shape.context_tokens} {number}"))


def _answers(labels: Tensor, is_right: Tensor) -> list[tuple[str, bool]]:
    """Kind and whether all tokens are right, for every run of answer tokens."""
    found: list[tuple[str, bool]] = []
    for row_labels, row_right in zip(labels.tolist(), is_right.tolist(), strict=True):
        before = -1
        for label, right in zip(row_labels, row_right, strict=True):
            if label > 0:
                kind, so_far = found.pop() if before > 0 else (KINDS[label - 1], True)
                found.append((kind, so_far and right))
            before = label
    return found


def chunks_alone_mask(context: Tensor) -> Tensor:
    """(B, 1, C, C): each segment sees itself; the last note token opens the question and sees all."""
    is_note = context == NOTE_ID
    segment = is_note.cumsum(1)
    last = segment == segment.amax(1, keepdim=True)
    alone = (segment[:, :, None] == segment[:, None, :]) | last[:, :, None]
    return (alone & torch.ones_like(alone[0]).tril())[:, None]
