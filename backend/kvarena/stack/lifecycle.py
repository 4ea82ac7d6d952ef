"""The commands that change what runs: up, restart and down; and what they share: signals, waiting, ending everything.

One of them at a time per instance. `up` either ends with every service healthy or leaves things as it found them;
`down` ends with nothing of the instance left, whatever state it was in.

Services start in the order they depend on each other. One that dies, or takes longer than its time, ends the wait with
`ServiceFailedError` and the end of its log. Any signal to end becomes one `KeyboardInterrupt`, and cleaning up goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvarena.client import API_KEY_VARIABLE
from kvarena.home import Home, StackError
from kvarena.model import DEFAULT_CPU_MODEL, obtain_default_model
from kvarena.stack import containers
from kvarena.stack.health import probe
from kvarena.stack.logs import first_exception, size_of
from kvarena.stack.plan import make_plan, pick_profile, uses_card
from kvarena.stack.preflight import check_api_key, checks_before_start, run_all
from kvarena.stack.processes import processes_of, shared_memory_freed, stop_leftovers
from kvarena.stack.record import Record, differences
from kvarena.stack.service import ProcessInfo, Runner, Service, ServiceFailedError, SupervisorGoneError
from kvarena.stack.services import build_services, record_of
from kvarena.stack.settings import Settings
from kvarena.stack.supervisord import required_supervisor, running_supervisor, start_supervisor

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FINAL_STATES = {"healthy": "green", "stopped": "dim", "failed": "red"}
"""Of services as they start and stop, with their colours."""


def stop_signals_raise() -> AbstractContextManager[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does."""
    return _handled_by(signal.default_int_handler)


def stop_signals_ignored() -> AbstractContextManager[None]:
    """The block runs to its end."""
    return _handled_by(signal.SIG_IGN)


@contextmanager
def _handled_by(handler: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Reporter:
    """Shows how services start and stop: on a terminal a line for each that changes in place, elsewhere a line whenever
    a state changes. It is told each service's state as often as that is looked at.
    """

    def __init__(self, console: Console, services: Iterable[Service]) -> None:
        self._console = console
        self._titles = {service.name: service.title for service in services}
        self._states = dict.fromkeys(self._titles, "waiting")
        self._began = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {
            name: self._progress.add_task(f"{name:<8} {title}", total=1, start=False, state="waiting")
            for name, title in self._titles.items()
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def update(self, name: str, state: str) -> None:
        if self._states[name] == state:
            return
        self._states[name] = state
        if not self._console.is_terminal:
            seconds = time.monotonic() - self._began
            self._console.print(f"{name} ({self._titles[name]}): {state} ({seconds:.0f} s)", highlight=False)
            return
        task, is_final = self._tasks[name], state in FINAL_STATES
        self._progress.start_task(task)
        shown = f"[{FINAL_STATES[state]}]{state}" if is_final else state
        self._progress.update(task, state=shown, completed=int(is_final))
        if is_final:
            self._progress.stop_task(task)


POLL_S = 0.5
LOG_LINES = 20


@dataclass(frozen=True)
class _Started:
    """What a service that is being waited for must stay: the same process, and in time."""

    pid: int
    deadline: float
    log_size: int


def start_and_wait(supervisor: Runner, services: Sequence[Service], reporter: Reporter) -> None:
    """Brings these services up; one that runs already is only waited for. Raises `ServiceFailedError`."""
    waiting = list(services)
    healthy: set[str] = set()
    started: dict[str, _Started] = {}
    names = {service.name for service in services}
    while waiting:
        processes = supervisor.processes()
        for service in list(waiting):
            reporter.update(service.name, "starting" if service.name in started else "waiting")
            if service.name not in started:
                if names.intersection(service.depends_on) <= healthy:
                    started[service.name] = _start(supervisor, service, processes)
                continue
            _check_alive(supervisor, service, started[service.name], processes[service.name], reporter)
            if probe(service) == "healthy":
                healthy.add(service.name)
                waiting.remove(service)
                reporter.update(service.name, "healthy")
        if waiting:
            time.sleep(POLL_S)


def _start(supervisor: Runner, service: Service, processes: Mapping[str, ProcessInfo]) -> _Started:
    log_size = size_of(service.log_path)
    if not processes[service.name].is_up:
        supervisor.start(service.name)
        processes = supervisor.processes()
    return _Started(
        pid=processes[service.name].pid,
        deadline=time.monotonic() + service.start_timeout_s,
        log_size=log_size,
    )


def _check_alive(supervisor: Runner, service: Service, start: _Started, now: ProcessInfo, reporter: Reporter) -> None:
    if now.pid != start.pid or not now.is_up:
        reason = "died while it was starting"
    elif time.monotonic() > start.deadline:
        reason = f"was not healthy within {service.start_timeout_s:.0f} s"
    else:
        return
    reporter.update(service.name, "failed")
    lines = supervisor.log_of_start(service, start.log_size)
    raise ServiceFailedError(
        service.name,
        reason,
        cause=first_exception(lines),
        log_tail="\n".join(lines[-LOG_LINES:]),
        log_path=service.log_path,
    )


def stop_and_wait(supervisor: Runner, services: Sequence[Service], reporter: Reporter) -> None:
    """Stops these services at once and waits until supervisord has seen each of them end."""
    running = list(services)
    for service in running:
        supervisor.stop(service.name)
    deadline = time.monotonic() + 2 * max((service.stop_timeout_s for service in running), default=0.0)
    while running and time.monotonic() < deadline:
        processes = supervisor.processes()
        for service in list(running):
            info = processes[service.name]
            if info.is_gone:
                running.remove(service)
            reporter.update(service.name, "stopped" if service not in running else "stopping")
        time.sleep(POLL_S / 2)


def stop_everything(home: Home, console: Console) -> tuple[list[str], list[int]]:
    """Returns the services it stopped, and the processes no supervisor answered for (any more)."""
    record, supervisor = running_supervisor(home)
    stopped: list[str] = []
    if record is not None and supervisor is not None:
        with shared_memory_freed(home, processes_of(home)):
            with contextlib.suppress(SupervisorGoneError):  # its services are leftovers now
                processes = supervisor.processes()
                running = [service for service in record.services if not processes[service.name].is_gone]
                with Reporter(console, running) as reporter:
                    stop_and_wait(supervisor, running, reporter)
                stopped = [service.name for service in running]
            supervisor.shut_down()
    leftovers = stop_leftovers(home)
    # Logs and caches stay.
    shutil.rmtree(home.secrets, ignore_errors=True)
    home.remove_run_folder(Path(record.run_folder) if record is not None else home.usual_run_folder)
    for path in (home.record, home.daemon_config, home.path / "supervisord.pid"):
        path.unlink(missing_ok=True)
    return stopped, leftovers


def up(
    settings: Settings, home: Home, console: Console, when_healthy: Callable[[Record], None] = lambda record: None
) -> None:
    """Starts what the settings ask for and isn't running, waits until all of it is healthy, and calls `when_healthy`.

    Raises `StackError` when it can't, after it has stopped what it started; Ctrl-C does the same at any point.
    """
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    if containers.are_wanted(settings):
        deployment = containers.plan_deployment(settings, home)
        bring_up(
            deployment.record,
            home,
            console,
            check=lambda services: run_all(deployment.checks(services, token)),
            secrets=settings.given_secrets,
            when_healthy=when_healthy,
            start_runner=deployment.start,
        )
        return
    _obtain_default_model(settings, home, console)
    plan = make_plan(settings, home)
    bring_up(
        record_of(plan, build_services(plan, home), bool(settings.api_key)),
        home,
        console,
        check=lambda services: run_all(checks_before_start(plan, services, token)),
        secrets=settings.secrets,
        when_healthy=when_healthy,
    )


def _obtain_default_model(settings: Settings, home: Home, console: Console) -> None:
    """Where it is the one to serve. That it can't be had stops nothing: another model takes its place."""
    if settings.model is not None or pick_profile(settings.profile)[0] != "cpu" or uses_card(settings):
        return
    try:
        obtain_default_model(home, console)
    except StackError as error:
        console.print(f"[yellow]{escape(f'{DEFAULT_CPU_MODEL} could not be downloaded: {error}')}[/]", soft_wrap=True)


def bring_up(
    wanted: Record,
    home: Home,
    console: Console,
    *,
    check: Callable[[Sequence[Service]], None],
    secrets: Mapping[str, str],
    when_healthy: Callable[[Record], None] = lambda record: None,
    start_runner: Callable[[Home, Record, Mapping[str, str]], Runner] = start_supervisor,
) -> None:
    """Makes the services of `wanted` run (its run folder is made here). `check` sees those that are about to start."""
    with home.lock(), stop_signals_raise():
        supervisor = _running_as_wanted(home, wanted, secrets.get(API_KEY_VARIABLE, ""), console)
        missing = not_running(supervisor, wanted.services)
        check(missing)
        try:
            if supervisor is None:
                wanted = dataclasses.replace(wanted, run_folder=str(home.new_run_folder()))
                wanted.write(home)
                supervisor = start_runner(home, wanted, secrets)
            with Reporter(console, wanted.services) as reporter:
                start_and_wait(supervisor, wanted.services, reporter)
            when_healthy(wanted)
        except BaseException:
            with stop_signals_ignored():
                _undo(home, wanted, missing, console)
            raise


def restart(name: str, home: Home, console: Console) -> Service:
    """Stops and starts one service and returns when it is healthy; it is stopped when it doesn't get there."""
    with home.lock(), stop_signals_raise():
        record, supervisor = required_supervisor(home)
        service = record.service(name)
        if service is None:
            names = ", ".join(service.name for service in record.services)
            raise StackError(f"no service {name!r} is running; there are {names}")
        with Reporter(console, [service]) as reporter:
            with shared_memory_freed(home, processes_of(home, name)):
                stop_and_wait(supervisor, [service], reporter)
            try:
                start_and_wait(supervisor, [service], reporter)
            except BaseException:
                with stop_signals_ignored():
                    stop_and_wait(supervisor, [service], reporter)
                raise
        return service


def down(home: Home, console: Console) -> None:
    """Stops everything of the instance and says what that was."""
    with home.lock(), stop_signals_ignored():
        stopped, leftovers = stop_everything(home, console)
    if stopped:
        console.print(f"Stopped: {', '.join(stopped)}.")
    if leftovers:
        console.print(f"Ended {len(leftovers)} more processes that had no supervisor.")
    if not stopped and not leftovers:
        console.print("Nothing was running.")


def _running_as_wanted(home: Home, wanted: Record, api_key: str, console: Console) -> Runner | None:
    """The supervisor that runs these very services; raises `StackError` when it runs others, or under another key.

    What a killed supervisor left behind, and a supervisor whose services have all ended, is cleared away.
    """
    record, supervisor = running_supervisor(home)
    if record is None or supervisor is None:
        _, leftovers = stop_everything(home, console)
        if leftovers:
            console.print(f"Ended {len(leftovers)} processes that had no supervisor.")
        return None
    if not any(process.is_up for process in supervisor.processes().values()):
        stop_everything(home, console)
        return None
    if changes := differences(record, wanted):
        raise StackError(
            "the stack is running with other settings:\n  "
            + "\n  ".join(changes)
            + "\nStop it first (./run-server.sh stop, or kvarena down), then start it with the new ones."
        )
    check_api_key(record.services, api_key)
    return supervisor


def not_running(supervisor: Runner | None, services: Sequence[Service]) -> list[Service]:
    processes = supervisor.processes() if supervisor else {}
    return [service for service in services if service.name not in processes or not processes[service.name].is_up]


def _undo(home: Home, record: Record, started: Sequence[Service], console: Console) -> None:
    """Back to what ran before: nothing at all, or the services that this `up` didn't start."""
    if not started:
        return
    console.print("Stopping what was started.")
    if len(started) == len(record.services):
        stop_everything(home, console)
        return
    _, supervisor = running_supervisor(home)
    if supervisor is not None:
        with contextlib.suppress(SupervisorGoneError), Reporter(console, started) as reporter:
            stop_and_wait(supervisor, started, reporter)
