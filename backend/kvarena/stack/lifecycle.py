"""The commands that change what runs: up, restart and down.

One of them at a time per instance. `up` either ends with every service healthy or leaves things as it found them;
`down` ends with nothing of the instance left, whatever state it was in.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape

from kvarena.api_key import API_KEY_VARIABLE
from kvarena.stack import containers, default_model, progress
from kvarena.stack.errors import StackError
from kvarena.stack.home import Home
from kvarena.stack.interrupts import stop_signals_ignored, stop_signals_raise
from kvarena.stack.plan import make_plan, pick_profile
from kvarena.stack.preflight import check_api_key, check_before_start
from kvarena.stack.record import Record, differences
from kvarena.stack.runner import Runner, SupervisorGoneError
from kvarena.stack.service import Service
from kvarena.stack.services import build_services
from kvarena.stack.settings import Settings
from kvarena.stack.startup import start_and_wait, stop_and_wait
from kvarena.stack.supervision import running_supervisor
from kvarena.stack.supervisord import start_supervisor
from kvarena.stack.teardown import stop_everything


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
            check=deployment.check,
            secrets=settings.given_secrets,
            when_healthy=when_healthy,
            start_runner=deployment.start,
        )
        return
    _obtain_default_model(settings, home, console)
    plan = make_plan(settings, home)
    wanted = Record(
        services=tuple(build_services(plan, home)),
        run_folder="",
        data_dir=str(plan.data_dir),
        served_model=plan.model.served_name,
        has_api_key=bool(settings.api_key),
        notice=plan.notice,
        chunk_tokens=plan.chunk_tokens,
        tokenizer_place=plan.tokenizer_place,
    )
    bring_up(
        wanted,
        home,
        console,
        check=lambda services: check_before_start(plan, services, token),
        secrets=settings.secrets,
        when_healthy=when_healthy,
    )


def _obtain_default_model(settings: Settings, home: Home, console: Console) -> None:
    """Where it is the one to serve. That it can't be had stops nothing: another model takes its place."""
    if settings.model is not None or pick_profile(settings.profile)[0] != "cpu":
        return
    try:
        default_model.obtain(home, console)
    except StackError as error:
        console.print(f"[yellow]{escape(f'{default_model.NAME} could not be had: {error}')}[/]", soft_wrap=True)


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
        missing = _not_running(supervisor, wanted.services)
        check(missing)
        try:
            if supervisor is None:
                wanted = dataclasses.replace(wanted, run_folder=str(home.new_run_folder()))
                wanted.write(home)
                supervisor = start_runner(home, wanted, secrets)
            with progress.reporter(console, wanted.services) as reporter:
                start_and_wait(supervisor, wanted.services, reporter)
            when_healthy(wanted)
        except BaseException:
            with stop_signals_ignored():
                _undo(home, wanted, missing, console)
            raise


def restart(name: str, home: Home, console: Console) -> Service:
    """Stops and starts one service and returns when it is healthy; it is stopped when it doesn't get there."""
    with home.lock(), stop_signals_raise():
        record, supervisor = running_supervisor(home)
        if record is None or supervisor is None:
            raise StackError("nothing is running; start the stack with ./run-server.sh")
        service = record.service(name)
        if service is None:
            names = ", ".join(service.name for service in record.services)
            raise StackError(f"no service {name!r} is running; there are {names}")
        with progress.reporter(console, [service]) as reporter:
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


def _not_running(supervisor: Runner | None, services: Sequence[Service]) -> list[Service]:
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
        with contextlib.suppress(SupervisorGoneError), progress.reporter(console, started) as reporter:
            stop_and_wait(supervisor, started, reporter)
