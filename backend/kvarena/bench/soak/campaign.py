"""The course of a soak run.

1. `plain` answers every prompt alone: these are the references.
2. The rehearsal: the streams without faults. What is held afterwards (connections, threads, memory) is what it takes.
3. The streams with faults.
4. Everybody goes home: what is left is looked at until it is as it was, for two minutes at most.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from kvarena.bench.results import REFERENCE, Row, spread
from kvarena.bench.soak import checks
from kvarena.bench.soak.checks import Check
from kvarena.bench.soak.faults import Faults, Struck
from kvarena.bench.soak.prompts import Prompt, PromptMaker
from kvarena.bench.soak.streams import TIE_MARGIN, Load, Target, ask_alone
from kvarena.client import AsyncClient
from kvarena.documents import FALLBACK_SEPARATOR, Documents
from kvarena.home import Home
from kvarena.stack.record import Record
from kvarena.stack.service import Runner

REHEARSAL_RATIO = 0.2
LONGEST_REHEARSAL_S = 60.0
FINDS_AGAIN_S = 60.0


@dataclass(frozen=True)
class SoakServer:
    """A contender to be soaked."""

    name: str
    url: str
    api_key: str = ""


@dataclass(frozen=True)
class Stack:
    """What runs on this machine, in processes."""

    home: Home
    record: Record
    runner: Runner


@dataclass
class Outcome:
    """What a run found. `rows` has an entry for each contender."""

    rows: list[Row]
    checks: list[Check]
    struck: list[Struck] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.is_ok]


@dataclass(frozen=True)
class Soak:
    """`seconds` is the time of the streams with faults. `tie_margin` is in logits. `faults` are kinds of
    `faults.FAULTS`; none without a stack. `timeout_s` is the longest that one request may take.
    """

    servers: Sequence[SoakServer]
    documents: Documents
    stack: Stack | None
    faults: Sequence[str]
    seconds: float
    num_streams: int = 32
    num_prompts: int = 60
    tie_margin: float = TIE_MARGIN
    timeout_s: float = 180.0
    seed: int = 0

    def __post_init__(self) -> None:
        if REFERENCE not in (server.name for server in self.servers):
            raise ValueError(f"answers are compared with those of {REFERENCE}, which is not among the servers")

    @property
    def rehearsal_s(self) -> float:
        return min(LONGEST_REHEARSAL_S, self.seconds * REHEARSAL_RATIO)

    @property
    def num_steps(self) -> int:
        """References, and seconds."""
        return self.num_prompts + int(self.rehearsal_s) + int(self.seconds)

    def settings(self) -> dict[str, Any]:
        """As they go into the result file."""
        return {
            "benchmark": "soak",
            "contenders": [server.name for server in self.servers],
            "faults": list(self.faults),
            "seconds": self.seconds,
            "rehearsal_s": self.rehearsal_s,
            "num_streams": self.num_streams,
            "num_prompts": self.num_prompts,
            "tie_margin": self.tie_margin,
            "timeout_s": self.timeout_s,
            "seed": self.seed,
        }

    async def run(self, advance: Callable[[], None]) -> Outcome:
        """Raises `ClientError` when a server doesn't answer at the beginning."""
        async with AsyncExitStack() as clients:
            targets = [await self._target(server, clients) for server in self.servers]
            plain = next(target for target in targets if target.name == REFERENCE)
            prompts = self._prompts(targets)
            references = []
            for prompt in prompts:
                references.append(await ask_alone(plain.client, plain.info.model, prompt, self.timeout_s))
                advance()
            load = Load(
                targets,
                prompts,
                references,
                tie_margin=self.tie_margin,
                timeout_s=self.timeout_s,
                seed=self.seed,
            )
            return await self._soak(load, advance)

    async def _target(self, server: SoakServer, clients: AsyncExitStack) -> Target:
        client = AsyncClient(server.url, server.api_key, 2 * self.timeout_s)
        clients.push_async_callback(client.aclose)
        return Target(server.name, client, await client.describe(), server.api_key)

    def _prompts(self, targets: Sequence[Target]) -> list[Prompt]:
        separators = [target.info.separator for target in targets]
        separator = next((one for one in separators if one is not None), FALLBACK_SEPARATOR)
        texts = [chunk.text for chunk in self.documents.chunks]
        longest = max(target.info.max_model_len or 0 for target in targets)
        maker = PromptMaker(texts, self.documents.system, separator, longest, self.seed)
        return maker.prompts(self.num_prompts)

    async def _soak(self, load: Load, advance: Callable[[], None]) -> Outcome:
        home, record = (self.stack.home, self.stack.record) if self.stack else (Home.find(), None)
        async with _ticking(advance, self.rehearsal_s):
            await load.run("rehearsal", self.num_streams, self.rehearsal_s)
        await load.end()
        before = await checks.look(load.targets, home, record)
        struck: list[Struck] = []
        async with _ticking(advance, self.seconds):
            streams = load.run("campaign", self.num_streams, self.seconds)
            if self.stack:
                faults = Faults(home, self.stack.record, self.stack.runner, load, self.faults, self.seed)
                struck = faults.struck
                await asyncio.gather(streams, faults.run(self.seconds))
            else:
                await streams
        await load.end()
        again = [await _finds_again(load, target) for target in load.targets if target.is_blend]
        await load.end()
        found = [check for target in load.targets for check in checks.answered(target)]
        found += [*checks.came_back(struck), *again]
        found += await checks.settle(load.targets, home, record, before)
        for target in load.targets:
            if target.has_reports:
                found += await checks.counted(target, before)
        return Outcome([_row(target) for target in load.targets], found, struck, load.findings)


async def _finds_again(load: Load, target: Target) -> Check:
    """The chunk cache works; after a fault of LMCache the blend may take some seconds to connect again."""
    deadline = time.monotonic() + FINDS_AGAIN_S
    while not (hits := await load.finds_again(target)) and time.monotonic() < deadline:
        await asyncio.sleep(checks.POLL_S)
    return Check("chunks found again", target.name, hits, "at least 1", hits > 0)


@asynccontextmanager
async def _ticking(advance: Callable[[], None], seconds: float) -> AsyncIterator[None]:
    """Advances once a second, and so many times in all."""

    async def tick() -> None:
        for _ in range(int(seconds)):
            await asyncio.sleep(1)
            advance()

    ticks = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticks.cancel()


def _row(target: Target) -> Row:
    outcomes = {f"num_{name.replace(' ', '_')}": count for name, count in sorted(target.outcomes.items())}
    return {
        "contender": target.name,
        "num_requests": target.outcomes.total() - target.outcomes["without report"],
        **outcomes,
        "num_compared_tokens": target.num_compared_tokens,
        "largest_logprob_shift": round(target.largest_shift, 6),
        "largest_tie": round(target.largest_tie, 6),
        "ttft_ms": spread(target.ttft_ms) if target.ttft_ms else None,
    }
