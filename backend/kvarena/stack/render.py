"""How the stack looks on a terminal: services as they start and stop, the table of services, errors, the warm-up.

While services start or stop, each has a line with a spinner on a terminal, and a line per change elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvarena.client import ChunkOutcome, ClientError
from kvarena.documents import Documents, Remark, load_documents
from kvarena.home import StackError
from kvarena.stack.chunk_cache import WarmResult, compute_contexts, warm
from kvarena.stack.record import Record
from kvarena.stack.service import Service, ServiceFailedError
from kvarena.stack.settings import SPECS
from kvarena.stack.status import StackStatus

STYLES = {"healthy": "green", "stopped": "dim", "failed": "red"}
FINAL_STATES = frozenset({"healthy", "stopped", "failed"})


class Reporter(Protocol):
    """Is told each service's state as often as it is looked at; used as a context."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: object) -> None: ...

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

    def __exit__(self, *raised: object) -> None:
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

    def __exit__(self, *raised: object) -> None:
        return None

    def update(self, name: str, state: str) -> None:
        if self._states.get(name, "waiting") == state:
            return
        self._states[name] = state
        seconds = time.monotonic() - self._began
        self._console.print(f"{name} ({self._titles[name]}): {state} ({seconds:.0f} s)", highlight=False)


def make_reporter(console: Console, services: Iterable[Service]) -> Reporter:
    return (LiveReporter if console.is_terminal else PlainReporter)(console, services)


STATE_STYLES = {"healthy": "green", "starting": "yellow", "restarting": "yellow", "stopping": "yellow"}
MAX_LINES_SHOWN = 10


def show_status(status: StackStatus, console: Console) -> None:
    if status.num_unsupervised:
        console.print(
            f"{status.num_unsupervised} processes are running without their supervisor, which was killed; "
            "./run-server.sh stop ends them."
        )
    elif not status.services:
        console.print("Nothing is running; start the stack with ./run-server.sh.")
    else:
        console.print(status_table(status))
        console.print(f"Model: {status.model}", highlight=False)
        if status.on_disk:
            console.print(
                f"{status.on_disk.as_text()}; ./run-server.sh clear empties it", highlight=False, soft_wrap=True
            )
        if status.notice:
            console.print(f"[yellow]{escape(status.notice)}[/]", soft_wrap=True)


def status_table(status: StackStatus) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("service", "address", "state", "uptime", "log"):
        table.add_column(column, no_wrap=column != "log", overflow="fold")
    for service in status.services:
        style = STATE_STYLES.get(service.state, "red")
        table.add_row(
            service.name,
            service.address,
            f"[{style}]{service.state}[/]",
            duration(service.uptime_s) if service.pid else "-",
            escape(_short_path(service.log)),
        )
    return table


def duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{int(seconds)} s"


def show_error(error: StackError, console: Console) -> None:
    """The message, and for a service that failed the end of its log."""
    if isinstance(error, ServiceFailedError) and error.log_tail:
        console.print(f"The end of {error.log_path}:", highlight=False, soft_wrap=True, style="dim")
        console.print(escape(error.log_tail), highlight=False, soft_wrap=True)
        console.print()
    console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def read_documents(record: Record, console: Console) -> Documents:
    """The stack's data folder, split as its page splits it; what is to be said of its files is shown.

    Raises `StackError` when there is no such folder.
    """
    splitter = record.splitter
    try:
        with console.status("reading the documents"):
            documents = load_documents(Path(record.data_dir), splitter)
    except ValueError as error:
        raise StackError(str(error)) from error
    if documents.is_split and splitter.estimates:
        console.print(
            "Chunks are of an estimated size, 4 bytes to a token: there is no tokenizer.json of this model here.",
            highlight=False,
        )
    show_problems(documents.problems, console)
    _show_first([str(note) for note in documents.notes], console)
    return documents


def show_problems(problems: Sequence[Remark], console: Console) -> None:
    """The files of a folder that can't be used, if any, with the reasons."""
    if problems:
        count = len(problems)
        console.print(f"[yellow]{count} file{'' if count == 1 else 's'} can't be used:[/]", highlight=False)
        _show_first([str(problem) for problem in problems], console)


def chunk_caches(record: Record) -> list[Service]:
    """The running contenders that have one."""
    return [service for service in record.services if (spec := SPECS.get(service.name)) and spec.has_chunk_cache]


def warm_with_progress(record: Record, documents: Documents, console: Console, api_key: str) -> WarmResult:
    """Fills the first chunk cache, with a bar. Raises `StackError` where there is none, or no answer."""
    if not (found := chunk_caches(record)):
        names = ", ".join(name for name, spec in SPECS.items() if spec.has_chunk_cache)
        raise StackError(f"no running contender has a chunk cache; start one that has: {names}")
    server = found[0]
    with _counting(console) as bar:
        task = bar.add_task("filling the chunk cache", total=len(documents.chunks))

        def advance(outcome: ChunkOutcome) -> None:
            if not bar.finished:  # a chunk that was lost again comes twice
                bar.advance(task)

        try:
            result = warm(server.address, record.served_model, documents.chunks, advance, api_key, documents.system)
        except ClientError as error:
            raise StackError(f"{server.name} does not answer: {error}") from error
    return replace(result, unusable=documents.problems)


def compute_contexts_with_progress(record: Record, documents: Documents, console: Console, api_key: str) -> None:
    """What the filled cache's chunks are in contexts, with a bar where that takes a while; the stack answers meanwhile.
    Raises `StackError` where there is no answer.
    """
    server = chunk_caches(record)[0]
    with _counting(console) as bar:
        task = bar.add_task("", total=None, visible=False)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total, visible=total > 0)

        try:
            compute_contexts(server.address, record.served_model, documents.chunks, show, api_key)
        except ClientError as error:
            raise StackError(f"{server.name} does not answer: {error}") from error


def _counting(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def show_warm_result(result: WarmResult, data_dir: str, console: Console) -> None:
    if not result.outcomes:
        console.print(f"No chunks in {_short_path(data_dir)}: the chunk cache is empty.", highlight=False)
        return
    counts = [f"{result.count('warmed')} computed", f"{result.count('already_there')} already there"]
    if too_short := result.chunks("too_short"):
        counts.append(f"{len(too_short)} too short to be kept")
    if result.failures:
        counts.append(f"[red]{len(result.failures)} failed[/]")
    console.print(f"Chunk cache: {', '.join(counts)}.", highlight=False)
    _show_first([f"{chunk.name}: too short to be kept" for chunk in too_short], console)
    _show_first([f"{failed.name}: {failed.reason}" for failed in result.failures], console)


def _show_first(lines: Sequence[str], console: Console) -> None:
    for line in lines[:MAX_LINES_SHOWN]:
        console.print(f"  {escape(line)}", highlight=False)
    if (more := len(lines) - MAX_LINES_SHOWN) > 0:
        console.print(f"  and {more} more", highlight=False)


def _short_path(path: str) -> str:
    """Relative to the working directory where it is below that."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
