"""Whom to measure: servers that are started for it, those of the running stack, and any OpenAI address."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from kvarena.bench.openai_server import OpenAIServer
from kvarena.bench.shapes import model_folder
from kvarena.bench.ttft.client import Contender
from kvarena.bench.ttft.own_servers import HF, OwnServers
from kvarena.stack.home import Home
from kvarena.stack.record import Record, command_options
from kvarena.stack.runner import Runner
from kvarena.stack.settings import shown_api_key
from kvarena.stack.supervision import running_supervisor

MEASURED = ("blend", "plain", "lmcache", HF)
OF_THIS_MACHINE = ("command", "--model", "--host", "--port")


@dataclass(frozen=True)
class Wanted:
    """Servers on `model` or `shape` (`own` has how), else those of `targets` (`NAME=URL`), else the running stack's,
    else servers on the town model.
    """

    model: str | None
    shape: str | None
    targets: Sequence[str]
    own: OwnServers
    timeout_s: float

    @contextmanager
    def found(self, max_model_len: int, console: Console) -> Iterator[list[Contender]]:
        """Connected to; those that were started end with the block, however it ends.

        Raises `ValueError` for an address where nothing answers, a name that is there twice and contexts too long for
        a server, `StackError` for servers that don't start.
        """
        # Servers end before their clients do: what still waits for an answer is told so.
        with ExitStack() as clients, ExitStack() as servers:
            contenders = list(self._of_targets())
            if self.starts_servers:
                folder = model_folder(self.model, self.shape)
                running = self.own.running(folder, self.shape is not None, max_model_len, console)
                contenders += self._of_stack(*servers.enter_context(running))
            elif not self.targets:
                contenders += self._of_stack(*running_supervisor(Home.find()))
            for contender in contenders:
                clients.callback(contender.close)
            _check(contenders, max_model_len)
            yield contenders

    @property
    def starts_servers(self) -> bool:
        return bool(self.model or self.shape) or not (self.targets or _stack_runs())

    def settings(self) -> dict[str, Any]:
        """As they go into the result file. A prefix cache that is None is as the servers have it."""
        if not self.starts_servers:
            return {"has_prefix_caching": None}
        return {"model": self.model or self.shape or "town", **self.own.settings()}

    def _of_stack(self, record: Record | None, supervisor: Runner | None) -> Iterator[Contender]:
        assert record is not None, "the stack runs"
        assert supervisor is not None, "the stack runs"
        processes = supervisor.processes()
        for service in record.services:
            if service.name in MEASURED:
                server = self._connect(service.name, service.address)
                given = {name: value for name, value in command_options(service).items() if name not in OF_THIS_MACHINE}
                yield Contender(server, processes[service.name].pid, given)

    def _of_targets(self) -> Iterator[Contender]:
        for target in self.targets:
            name, _, url = target.partition("=")
            if not name or not url:
                raise ValueError(f"--target is {target!r}; it is NAME=URL")
            yield Contender(self._connect(name, url if "://" in url else f"http://{url}"), is_target=True)

    def _connect(self, name: str, url: str) -> OpenAIServer:
        return OpenAIServer(name, url, shown_api_key(), self.timeout_s)


def _stack_runs() -> bool:
    record, supervisor = running_supervisor(Home.find())
    return supervisor is not None and record is not None and any(map(record.service, MEASURED))


def _check(contenders: Sequence[Contender], max_model_len: int) -> None:
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise ValueError(f"two contenders have one name: {', '.join(names)}")
    for contender in contenders:
        longest = contender.server.max_model_len
        if longest is not None and longest < max_model_len:
            raise ValueError(
                f"{contender.name} takes {longest} tokens; the longest context with its question and answer has up to "
                f"{max_model_len}"
            )
