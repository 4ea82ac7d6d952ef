"""Shows what the services are doing: one line each with a spinner on a terminal, a line per change elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from kvarena.stack.service import Service

STYLES = {"healthy": "green", "stopped": "dim", "failed": "red"}
FINAL_STATES = frozenset({"healthy", "stopped", "failed"})


class Reporter(Protocol):
    """Is told each service's state as often as it is looked at; used as a context."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, name: str, state: str) -> None: ...


class LiveReporter:
    """A line per service that changes in place."""

    def __init__(self, console: Console, services: Iterable[Service]) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {
            service.name: self._progress.add_task(
                f"{service.name:<8} {service.title}", total=1, start=False, state="waiting"
            )
            for service in services
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, name: str, state: str) -> None:
        task = self._tasks[name]
        if state != "waiting":
            self._progress.start_task(task)
        shown = f"[{STYLES[state]}]{state}" if state in STYLES else state
        self._progress.update(task, state=shown, completed=int(state in FINAL_STATES))
        if state in FINAL_STATES:
            self._progress.stop_task(task)


class PlainReporter:
    """A line whenever a service's state changes, for logs and pipes."""

    def __init__(self, console: Console, services: Iterable[Service]) -> None:
        self._console = console
        self._titles = {service.name: service.title for service in services}
        self._states: dict[str, str] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def update(self, name: str, state: str) -> None:
        if self._states.get(name, "waiting") == state:
            return
        self._states[name] = state
        seconds = time.monotonic() - self._began
        self._console.print(f"{name} ({self._titles[name]}): {state} ({seconds:.0f} s)", highlight=False)


def reporter(console: Console, services: Iterable[Service]) -> Reporter:
    return (LiveReporter if console.is_terminal else PlainReporter)(console, services)
