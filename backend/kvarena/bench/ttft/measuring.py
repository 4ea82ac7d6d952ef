"""The measurement: for every cell, every setup is asked the same prompts in turn, burst by burst."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoTokenizer

from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row
from kvarena.bench.ttft.client import Burst, Contender
from kvarena.bench.ttft.rows import Measured, cell_rows
from kvarena.bench.ttft.workload import Cell, Prompts, Vocabulary, Workload

REFERENCE = "plain"
FALLBACK_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Bench:
    """`policies` are what every blend is asked for, `separator` goes between chunks."""

    contenders: Mapping[str, Contender]
    policies: Mapping[str, Sequence[Setup]]
    workload: Workload
    separator: str
    vocabulary: Vocabulary

    @classmethod
    def of(
        cls,
        contenders: Sequence[Contender],
        policies: Sequence[Setup],
        workload: Workload,
        separator: str | None,
        tokenizer: str | None,
    ) -> Bench:
        """Every blend is asked for all of `policies`, whichever contender they name.

        Without a separator the blend's is taken, without a tokenizer the first server's. Raises `ValueError` and
        `OSError` for a tokenizer that isn't there or that has no words.
        """
        known = [separator, *(contender.server.separator for contender in contenders), FALLBACK_SEPARATOR]
        chosen = next(one for one in known if one is not None)
        name = tokenizer or contenders[0].server.root or contenders[0].server.model
        vocabulary = Vocabulary.of(AutoTokenizer.from_pretrained(name), chosen)
        blends = {b.name: [replace(one, contender=b.name) for one in policies] for b in contenders if b.is_blend}
        return cls({one.name: one for one in contenders}, blends, workload, chosen, vocabulary)

    @property
    def num_steps(self) -> int:
        return self.workload.repeats * sum(len(self.setups(cell.state)) for cell in self.workload.cells)

    def settings(self) -> dict[str, Any]:
        """As they go into the result file."""
        return {
            "separator": self.separator,
            "policies": {name: [setup.choices for setup in setups] for name, setups in self.policies.items()},
            "contenders": {name: contender.describe() for name, contender in self.contenders.items()},
            **vars(self.workload),
        }

    def setups(self, state: str) -> list[Setup]:
        """Who is compared. With no chunk in the prompt a blend has nothing to choose."""
        setups: list[Setup] = []
        for name in self.contenders:
            blends = self.policies.get(name) if state != "none" else None
            setups += blends or [Setup(name)]
        return setups

    def run(self, on_step: Callable[[], None]) -> Iterator[list[Row]]:
        """The rows of one cell after the other; `on_step` is called after each burst. Failures are counted in them."""
        rng = random.Random(self.workload.seed)
        for context_tokens in self.workload.context_tokens:
            prompts = Prompts(self.vocabulary, self.workload, context_tokens, rng)
            self._warm_up(prompts)
            for cell in (cell for cell in self.workload.cells if cell.context_tokens == context_tokens):
                measured = self._measure(cell, prompts, on_step)
                yield cell_rows(cell, measured, REFERENCE, num_known_chunks=prompts.num_known(cell.state))

    def _warm_up(self, prompts: Prompts) -> None:
        """Every setup meets a prompt of this length once, in the first state it is measured in."""
        if "warm" in self.workload.states:
            self._teach(prompts, [(name, "") for name in self.policies])
        first_states: dict[Setup, str] = {}
        for cell in self.workload.cells:
            for setup in self.setups(cell.state):
                first_states.setdefault(setup, cell.state)
        for setup, state in first_states.items():
            self.contenders[setup.contender].ask_at_once([prompts.draw(state)], setup, self.workload.max_new_tokens)

    def _teach(self, prompts: Prompts, places: Iterable[tuple[str, str]]) -> None:
        """Has the known chunks stored by these blends, for these salts."""
        for name, salt in places:
            self.contenders[name].ask_at_once([prompts.teach()], Setup(name, "none"), 1, salt)

    def _measure(self, cell: Cell, prompts: Prompts, on_step: Callable[[], None]) -> list[Measured]:
        setups = self.setups(cell.state)
        salts = {setup: _salt(cell, setup) for setup in setups}
        if cell.state == "half":
            self._teach(prompts, [(setup.contender, salt) for setup, salt in salts.items() if salt])
        bursts: dict[Setup, list[Burst]] = {setup: [] for setup in setups}
        for repeat in range(self.workload.repeats):
            batch = [prompts.draw(cell.state) for _ in range(cell.concurrency)]
            first = repeat % len(setups)
            for setup in [*setups[first:], *setups[:first]]:
                contender = self.contenders[setup.contender]
                burst = contender.ask_at_once(batch, setup, self.workload.max_new_tokens, salts[setup])
                bursts[setup].append(burst)
                on_step()
        return [Measured(setup, self.contenders[setup.contender].is_told, bursts[setup]) for setup in setups]


def _salt(cell: Cell, setup: Setup) -> str:
    """Policies of one blend are asked the same new chunks, which the first one would make known to the others.

    vLLM allows few characters in a salt, and a label has others.
    """
    brings_chunks = setup.policy is not None and cell.state in ("half", "cold")
    return hashlib.sha256(f"{setup.label} {cell.context_tokens}".encode()).hexdigest() if brings_chunks else ""
