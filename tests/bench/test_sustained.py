"""Many requests over more chunks than fit: which chunks they have, and the figures of each fifth of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import pytest

from kvarena.bench.measure import Reuse
from kvarena.bench.prompts import Vocabulary
from kvarena.bench.sustained import SustainedPrompts, SustainedWorkload, lasting, run
from kvarena.bench.ttft import Burst, Contender, Timed
from kvarena.bench.variants import Variant
from support.tiny_models import tiny_tokenizer

from .test_prompts import chunks_of

VOCABULARY = Vocabulary.of(tiny_tokenizer().backend_tokenizer, " # # ")
WORKLOAD = SustainedWorkload(50, 20, 4, 1, chunk_tokens=32)


def test_few_chunks_are_asked_for_often_and_some_never_come_again() -> None:
    prompts = SustainedPrompts(VOCABULARY, WORKLOAD)
    known = [chunk for prompt in prompts.all_known() for chunk in chunks_of(prompt)]
    assert len(set(known)) == len(known) == WORKLOAD.num_chunks
    asked = Counter(chunk for _ in range(300) for chunk in chunks_of(prompts.draw()))
    assert sum(count for chunk, count in asked.items() if chunk not in known) == 300
    assert max(count for chunk, count in asked.items() if chunk not in known) == 1
    assert asked.most_common(1)[0][0] == known[-1], "the most popular one comes last, and is freshest in a store"
    assert asked[known[-1]] > 3 * asked[known[0]]
    assert {len(prompt) for prompt in (prompts.draw() for _ in range(5))} < set(range(WORKLOAD.longest_tokens))


class Fading:
    """Answers in a time that grows from request to request."""

    def __init__(self, name: str, ttft_s: float, growth: float) -> None:
        self.name, self._ttft_s, self._growth = name, ttft_s, growth

    def ask_at_once(self, prompts: Sequence[Sequence[int]], variant: Variant, max_tokens: int) -> Burst:
        self._ttft_s *= self._growth
        report = {"store_hits": 3, "store_misses": 1}
        return Burst([Timed(0.0, self._ttft_s, self._ttft_s, 1, Reuse(100, 60), report)])


def test_each_fifth_has_its_own_speedup_and_hits() -> None:
    variants = [Variant("blend", "chunk_head", 0.05), Variant("plain")]
    contenders = cast("list[Contender]", [Fading("blend", 0.1, 1.01), Fading("plain", 1.0, 1.0)])
    steps: list[None] = []
    rows = run(contenders, variants, SustainedPrompts(VOCABULARY, WORKLOAD), 50, lambda: steps.append(None))
    assert len(steps) == 100
    assert [(row["contender"], row["first_request"]) for row in rows] == [
        (name, first) for name in ("blend", "plain") for first in range(0, 50, 10)
    ]
    assert {(row["hit_ratio"], row["reused_ratio"], row["num_failed"]) for row in rows} == {(0.75, 0.6, 0)}
    assert lasting(rows) == {"blend chunk_head 5 %": pytest.approx(1.01**-40, abs=1e-3)}


@pytest.mark.parametrize("wrong", [{"num_requests": 4}, {"new_per_request": 8}, {"num_chunks": 7}])
def test_what_cannot_be_drawn_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="request"):
        SustainedWorkload(**wrong)
