"""What is done to the services of the stack during a soak run, where they are processes of this machine.

One fault at a time, until its service is healthy again. A round has every fault of LMCache in a random order, and after
the first of them the kill of a vLLM server, or of its engine.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import operator
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil

from kvarena.bench.soak.streams import Load
from kvarena.client import AsyncClient
from kvarena.contenders.spec import LMCACHE_SERVER
from kvarena.home import Home
from kvarena.stack.health import probe
from kvarena.stack.processes import processes_of
from kvarena.stack.record import Record
from kvarena.stack.service import Runner, Service

Found = TypeVar("Found")

NO_FAULTS = "none"
OF_VLLM = ("kill-server", "kill-engine")
ENGINE = "EngineCore"
PAUSE_S = (3.0, 9.0)
FROZEN_S = (2.0, 12.0)
RESTARTS_S = 60.0
"""Beyond a service's own time to start: supervisord waits between attempts, and the machine is busy."""
POLL_S = 0.5
FULL_RATIO = 0.75
FILL_S = 30.0
NUM_FILLING = 8


@dataclass
class Struck:
    """A fault that happened, from the run's beginning; `back_s` is None where the service didn't come back."""

    kind: str
    service: str
    at_s: float
    back_s: float | None = None


class Faults:
    """Strikes the services of a record. `struck` is what has happened so far."""

    def __init__(self, home: Home, record: Record, runner: Runner, load: Load, kinds: Sequence[str], seed: int) -> None:
        self.struck: list[Struck] = []
        self._home, self._record, self._runner, self._load = home, record, runner, load
        self._rng = random.Random(f"faults {seed}")
        self._started_s = time.monotonic()
        self._of_vllm = [kind for kind in kinds if kind in OF_VLLM]
        self._of_lmcache = [kind for kind in kinds if kind not in OF_VLLM]
        self._lmcache = record.service(LMCACHE_SERVER)

    async def run(self, seconds: float) -> None:
        """No fault begins after this time; the last one may end later."""
        ends_s = time.monotonic() + seconds
        for kind, service in self._course():
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))
            if time.monotonic() >= ends_s:
                return
            if not await self._strike(kind, service):
                return

    def _course(self) -> Iterator[tuple[str, Service]]:
        """Endless, unless there is nothing to do."""
        servers = [service for target in self._load.targets if (service := self._record.service(target.name))]
        for turn in itertools.count():
            course: list[tuple[str, Service]] = []
            if self._lmcache:
                course += [(kind, self._lmcache) for kind in self._rng.sample(self._of_lmcache, len(self._of_lmcache))]
            if self._of_vllm:
                kind = self._of_vllm[turn // len(servers) % len(self._of_vllm)]
                course.insert(1, (kind, servers[turn % len(servers)]))
            if not course:
                return
            yield from course

    async def _strike(self, kind: str, service: Service) -> bool:
        """Whether the service came back."""
        struck = Struck(kind, service.name, time.monotonic() - self._started_s)
        self.struck.append(struck)
        await FAULTS[kind](self, service)
        if not await self._is_back(service):
            return False
        struck.back_s = time.monotonic() - self._started_s
        for target in self._load.targets:
            target.down = [(start, min(end, time.monotonic())) for start, end in target.down]
        return True

    async def _is_back(self, service: Service) -> bool:
        patience_s = service.start_timeout_s + RESTARTS_S
        state = await until(lambda: asyncio.to_thread(probe, service), lambda one: one == "healthy", patience_s, POLL_S)
        return state == "healthy"

    async def _kill(self, service: Service) -> None:
        pid = await self._pid(service)
        self._kill_all(service, [psutil.Process(pid)])
        await self._gone(service, pid)

    async def _kill_engine(self, service: Service) -> None:
        """Its API server ends by itself then."""
        pid = await self._pid(service)
        processes = await asyncio.to_thread(processes_of, self._home, service.name)
        self._kill_all(service, [one for one in processes if any(ENGINE in word for word in one.cmdline())])
        await self._gone(service, pid)

    def _kill_all(self, service: Service, processes: Sequence[psutil.Process]) -> None:
        for target in self._load.targets:
            if target.name == service.name:
                target.down.append((time.monotonic(), math.inf))
        for process in processes:
            process.kill()

    async def _freeze(self, service: Service) -> None:
        processes = await asyncio.to_thread(processes_of, self._home, service.name)
        try:
            for process in processes:
                process.suspend()
            await asyncio.sleep(self._rng.uniform(*FROZEN_S))
        finally:
            for process in processes:
                process.resume()

    async def _restart(self, service: Service) -> None:
        pid = await self._pid(service)
        await asyncio.to_thread(self._runner.stop, service.name)
        await self._gone(service, pid)
        await asyncio.to_thread(self._runner.start, service.name)

    async def _clear(self, service: Service) -> None:
        async with http_of(service) as client:
            await client.post("/cache/clear", {})

    async def _fill(self, service: Service) -> None:
        """With chunks under new salts, until LMCache begins to evict."""
        target = next((target for target in self._load.targets if target.is_blend), None)
        ends_s = time.monotonic() + FILL_S
        async with http_of(service) as client:
            while target and time.monotonic() < ends_s:
                if (await client.lmcache_memory())["memory_usage_ratio"] >= FULL_RATIO:
                    return
                cold = [self._load.cold_ask(self._rng) for _ in range(NUM_FILLING)]
                await asyncio.gather(*(self._load.send(target, ask) for ask in cold))

    async def _pid(self, service: Service) -> int:
        processes = await asyncio.to_thread(self._runner.processes)
        return processes[service.name].pid

    async def _gone(self, service: Service, pid: int) -> None:
        """Waits until a process has ended; for as long as the service may take to stop."""
        patience_s = 2 * service.stop_timeout_s
        await until(lambda: asyncio.to_thread(psutil.pid_exists, pid), operator.not_, patience_s, POLL_S)


FAULTS: dict[str, Callable[[Faults, Service], Awaitable[None]]] = {
    "kill-server": Faults._kill,
    "kill-engine": Faults._kill_engine,
    "kill": Faults._kill,
    "freeze": Faults._freeze,
    "restart": Faults._restart,
    "clear": Faults._clear,
    "fill": Faults._fill,
}


def read_faults(text: str) -> tuple[str, ...]:
    """Of the command line; raises `ValueError` naming the choices."""
    if text == NO_FAULTS:
        return ()
    kinds = tuple(FAULTS) if text == "all" else tuple(kind.strip() for kind in text.split(","))
    if unknown := [kind for kind in kinds if kind not in FAULTS]:
        raise ValueError(f"--faults is {unknown[0]!r}; it is {NO_FAULTS}, all, or some of {', '.join(FAULTS)}")
    return kinds


async def until(
    look: Callable[[], Awaitable[Found]], is_enough: Callable[[Found], bool], seconds: float, poll_s: float
) -> Found:
    """Looks again and again, at least once, until it finds enough or the time is over; what it found last."""
    deadline_s = time.monotonic() + seconds
    while not is_enough(found := await look()) and time.monotonic() < deadline_s:
        await asyncio.sleep(poll_s)
    return found


@asynccontextmanager
async def http_of(service: Service) -> AsyncIterator[AsyncClient]:
    """A client of LMCache's own paths."""
    client = AsyncClient(service.health_url.rsplit("/", 1)[0])
    try:
        yield client
    finally:
        await client.aclose()
