"""The chunk cache as a whole: filling it from the data folder, how much of it is on disk, and emptying it.

`warm` asks the blend for each chunk whether the store has it, sends those that are missing, and looks again: what it
says is what the store said at the end.

Chunks are kept in the LMCache server's memory and in its second tier. That is a folder unless another was chosen;
others are emptied by their own tools. What vLLM's own prefix caches hold stays until their servers are restarted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvarena.client import API_KEY_VARIABLE, ChunkOutcome, Client, ClientError, Outcome, Refused
from kvarena.contenders.servers import GIB
from kvarena.contenders.spec import LMCACHE_SERVER
from kvarena.documents import Documents, Remark, TextChunk, load_documents
from kvarena.home import Home, StackError, short_path
from kvarena.stack import lmcache_l2
from kvarena.stack.record import Record
from kvarena.stack.service import Service
from kvarena.stack.settings import SPECS
from kvarena.stack.supervisord import running_supervisor

NUM_PARALLEL_WARM_REQUESTS = 4
CLEAR_TIMEOUT_S = 30.0
MAX_LINES_SHOWN = 10


# --- The data folder ---


def read_documents(record: Record, console: Console) -> Documents:
    """The stack's data folder, split as its page splits it. Files that can't be used are named on the console.

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


def _show_first(lines: Sequence[str], console: Console) -> None:
    for line in lines[:MAX_LINES_SHOWN]:
        console.print(f"  {escape(line)}", highlight=False)
    if (more := len(lines) - MAX_LINES_SHOWN) > 0:
        console.print(f"  and {more} more", highlight=False)


# --- Filling ---


@dataclass(frozen=True)
class WarmResult:
    """A chunk is too short when it has so few tokens that the blend doesn't keep it: it is computed each time.

    `unusable` are the folder's files that no chunks could be made of.
    """

    outcomes: tuple[ChunkOutcome, ...]
    unusable: tuple[Remark, ...] = ()

    def chunks(self, outcome: Outcome) -> tuple[ChunkOutcome, ...]:
        return tuple(chunk for chunk in self.outcomes if chunk.outcome == outcome)

    def count(self, outcome: Outcome) -> int:
        return len(self.chunks(outcome))

    @property
    def failures(self) -> tuple[ChunkOutcome, ...]:
        return self.chunks("failed")

    def to_json(self) -> dict[str, Any]:
        return {
            "num_chunks": len(self.outcomes),
            "num_warmed": self.count("warmed"),
            "num_already_there": self.count("already_there"),
            "num_too_short": self.count("too_short"),
            "num_failed": self.count("failed"),
            "too_short": [chunk.name for chunk in self.chunks("too_short")],
            "failures": [{"chunk": failed.name, "reason": failed.reason} for failed in self.failures],
            "unusable": [{"file": remark.file, "reason": remark.text} for remark in self.unusable],
        }


def warm(
    base_url: str,
    model: str,
    chunks: Sequence[TextChunk],
    on_chunk: Callable[[ChunkOutcome], None] = lambda outcome: None,
    api_key: str = "",
    system: str | None = None,
) -> WarmResult:
    """Sends the chunks, a few at a time; one that is refused doesn't stop the others. With `system`, chats that have
    this system prompt find their beginning there, too.

    `on_chunk` is called after each, and once more for a chunk that later ones took the room of. Raises `ClientError`
    when the server doesn't answer at all, or isn't a blend, and `StackError` when it serves its model without blending,
    isn't ours, or asks for another key.
    """
    with Client(base_url, api_key) as client:
        try:
            offer = client.get("/kvarena")
        except Refused as error:
            if error.status == HTTPStatus.NOT_FOUND:
                reason = "LMCache's own blender has no chunk cache to fill ahead: it stores what requests bring"
                raise StackError(reason) from error
            if error.status == HTTPStatus.UNAUTHORIZED:
                raise StackError(f"{base_url} refuses {API_KEY_VARIABLE}: {error.reason}") from error
            raise
        if not offer.get("blends", True):
            raise StackError(f"the chunk cache stays empty: {offer.get('reason')}")
        separator = str(offer.get("separator", ""))
        outcomes = client.warm(model, chunks, separator, NUM_PARALLEL_WARM_REQUESTS, on_chunk)
        if system is not None:
            client.warm_beginning(model, system, separator)
        return WarmResult(tuple(outcomes))


def chunk_caches(record: Record) -> list[Service]:
    """The running contenders that have one."""
    return [service for service in record.services if (spec := SPECS.get(service.name)) and spec.has_chunk_cache]


def warm_with_progress(record: Record, documents: Documents, console: Console, api_key: str) -> WarmResult:
    """Fills the first chunk cache, with a bar. Raises `StackError` where there is none, or no answer."""
    if not (found := chunk_caches(record)):
        names = ", ".join(name for name, spec in SPECS.items() if spec.has_chunk_cache)
        raise StackError(f"no running contender has a chunk cache; start one that has: {names}")
    server = found[0]
    with _bar(console) as bar:
        task = bar.add_task("filling the chunk cache", total=len(documents.chunks))

        def advance(outcome: ChunkOutcome) -> None:
            if not bar.finished:  # a chunk that was lost again comes twice
                bar.advance(task)

        try:
            result = warm(server.address, record.served_model, documents.chunks, advance, api_key, documents.system)
        except ClientError as error:
            raise StackError(f"{server.name} does not answer: {error}") from error
    return replace(result, unusable=documents.problems)


def compute_contexts(record: Record, documents: Documents, console: Console, api_key: str) -> None:
    """What takes longer than filling the cache, and goes on while the stack answers: the scores of its chunks where the
    server's own policy reads them, then their seams where it takes these. Raises `StackError` where there is no answer.
    """
    server, model, chunks = chunk_caches(record)[0], record.served_model, documents.chunks
    with _bar(console) as bar, Client(server.address, api_key) as client:
        task = bar.add_task("", total=None, visible=False)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total, visible=total > 0)

        try:
            offer = client.get("/kvarena")
            separator = str(offer.get("separator", ""))
            if offer.get("reads_scores"):
                client.score(model, chunks, separator, partial(show, "finding which tokens need their context"))
            if offer.get("seams"):
                client.make_seams(model, chunks, separator, partial(show, "computing chunks after the chunk before"))
        except ClientError as error:
            raise StackError(f"{server.name} does not answer: {error}") from error


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def show_warm_result(result: WarmResult, data_dir: str, console: Console) -> None:
    if not result.outcomes:
        console.print(f"No chunks in {short_path(data_dir)}: the chunk cache is empty.", highlight=False)
        return
    counts = [f"{result.count('warmed')} computed", f"{result.count('already_there')} already there"]
    if too_short := result.chunks("too_short"):
        counts.append(f"{len(too_short)} too short to be kept")
    if result.failures:
        counts.append(f"[red]{len(result.failures)} failed[/]")
    console.print(f"Chunk cache: {', '.join(counts)}.", highlight=False)
    _show_first([f"{chunk.name}: too short to be kept" for chunk in too_short], console)
    _show_first([f"{failed.name}: {failed.reason}" for failed in result.failures], console)


# --- What is on disk, and emptying it all ---


@dataclass(frozen=True)
class OnDisk:
    """The folder behind LMCache's memory. `bound_bytes` is 0 where nobody set a bound."""

    folder: str
    size_bytes: int
    bound_bytes: int

    def as_text(self) -> str:
        bound = f" of at most {self.bound_bytes / GIB:.3g} GiB" if self.bound_bytes else ""
        return f"Chunks on disk: {self.size_bytes / 2**20:.0f} MiB{bound} in {self.folder}"


@dataclass(frozen=True)
class Cleared:
    """`second_tier` is one that isn't a folder, and was left alone; empty where there is none."""

    memory: bool
    folder: str
    folder_bytes: int
    second_tier: str = ""

    def as_text(self) -> str:
        memory = "LMCache's memory is empty" if self.memory else "No LMCache server is running"
        lines = [f"{memory}; {self.folder_bytes / 2**20:.0f} MiB removed from {self.folder}."]
        if self.second_tier:
            lines.append(f"The second tier ({self.second_tier}) keeps its chunks, and goes on answering.")
        if self.memory:
            lines.append("vLLM's own prefix caches keep theirs until a restart: ./run-server.sh restart NAME")
        return "\n".join(lines)


def on_disk(record: Record) -> OnDisk | None:
    """What a running stack keeps on the disk; `None` where its second tier is no folder of this machine."""
    server = record.service(LMCACHE_SERVER)
    adapter = lmcache_l2.adapter_of(server.command) if server and not record.compose else None
    folder = lmcache_l2.folder_of(adapter)
    if adapter is None or folder is None:
        return None
    return OnDisk(str(folder), lmcache_l2.size_bytes(folder), lmcache_l2.bound_bytes(adapter))


def clear(home: Home) -> Cleared:
    """Empties the memory of the running LMCache server, and the folder. Raises `StackError` when the server refuses."""
    record, supervisor = running_supervisor(home)
    server = record.service(LMCACHE_SERVER) if record and supervisor else None
    adapter = lmcache_l2.adapter_of(server.command) if server else None
    folder = lmcache_l2.folder_of(adapter) or home.chunks
    if server:
        url = server.health_url.rsplit("/", 1)[0]
        try:
            with Client(url, timeout_s=CLEAR_TIMEOUT_S) as client:
                client.post("/cache/clear", {})
        except ClientError as error:
            raise StackError(f"the LMCache server at {url} could not be emptied: {error}") from error
    try:
        freed = lmcache_l2.clear_folder(folder)
    except OSError as error:
        raise StackError(f"{folder} could not be emptied: {error.strerror}") from error
    other = str(adapter["type"]) if adapter and lmcache_l2.folder_of(adapter) is None else ""
    return Cleared(server is not None, str(folder), freed, other)
