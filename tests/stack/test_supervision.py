"""The stack's life on real processes: supervisord with small services that answer, hang, die and are killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from kvarena.home import Home, StackError
from kvarena.stack import lifecycle
from kvarena.stack.logs import tail
from kvarena.stack.processes import processes_of
from kvarena.stack.record import Record, read_record
from kvarena.stack.service import Service, ServiceFailedError
from kvarena.stack.status import stack_status
from kvarena.stack.supervisord import Supervisor, running_supervisor
from support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MakeService = Callable[..., Service]

UP = """
from rich.console import Console
from kvarena.cli import run
from kvarena.home import Home
from kvarena.stack import lifecycle
from kvarena.stack.record import read_record

home = Home.find()
wanted = read_record(home)
run(lambda: lifecycle.bring_up(wanted, home, Console(), check=lambda missing: None, secrets={}))
"""
"""Brings up what is written down in the home of the environment."""


def record_of(*services: Service) -> Record:
    return Record(services=services, run_folder="", data_dir="data", served_model="town")


def bring_up(home: Home, console: Console, *services: Service) -> None:
    lifecycle.bring_up(record_of(*services), home, console, check=lambda missing: None, secrets={})


def states(home: Home) -> dict[str, str]:
    return {service.name: service.state for service in stack_status(home).services}


def pids(home: Home) -> dict[str, int]:
    return {service.name: service.pid for service in stack_status(home).services}


def supervisor_of(home: Home) -> Supervisor:
    supervisor = running_supervisor(home)[1]
    assert isinstance(supervisor, Supervisor)
    return supervisor


def assert_nothing_left(home: Home) -> None:
    assert not processes_of(home)
    assert sorted(path.name for path in home.path.iterdir()) == ["cache", "lock", "logs"]
    assert stack_status(home).exit_code == 3


def test_up_status_restart_down(home: Home, console: Console, small_service: MakeService) -> None:
    first = small_service("first", "--healthy-after", "1")
    second = small_service("second", depends_on=("first",))

    bring_up(home, console, first, second)

    assert states(home) == {"first": "healthy", "second": "healthy"}
    assert stack_status(home).exit_code == 0
    started = {p.pid: p.create_time() for p in processes_of(home)}
    begun = {name: psutil.Process(pid).create_time() for name, pid in pids(home).items()}
    assert begun["second"] - begun["first"] >= 1, "a service is started when those it depends on are healthy"
    assert len(started) == 5, "supervisord, two services, a child of each"

    before = pids(home)
    lifecycle.restart("second", home, console)
    assert states(home) == {"first": "healthy", "second": "healthy"}
    assert pids(home)["first"] == before["first"]
    assert pids(home)["second"] != before["second"]

    lifecycle.down(home, console)
    assert_nothing_left(home)
    lifecycle.down(home, console)
    assert console.file.getvalue().endswith("Nothing was running.\n")  # type: ignore[attr-defined]


def test_the_environment_arrives_as_it_is(home: Home, console: Console, small_service: MakeService) -> None:
    service = small_service("only")
    bring_up(home, console, service)
    environment = psutil.Process(pids(home)["only"]).environ()
    assert environment["QUOTES"] == service.environment["QUOTES"]


def test_secrets_reach_services_and_no_file(home: Home, console: Console, small_service: MakeService) -> None:
    record = record_of(small_service("only"))
    lifecycle.bring_up(record, home, console, check=lambda missing: None, secrets={"HF_TOKEN": "hf_secret"})
    assert psutil.Process(pids(home)["only"]).environ()["HF_TOKEN"] == "hf_secret"
    files = [path for path in home.path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]


def test_up_twice_does_nothing_twice(home: Home, console: Console, small_service: MakeService) -> None:
    services = small_service("first"), small_service("second")
    bring_up(home, console, *services)
    before = pids(home)
    bring_up(home, console, *services)
    assert pids(home) == before


def test_up_starts_what_is_missing(home: Home, console: Console, small_service: MakeService) -> None:
    services = small_service("first"), small_service("second")
    bring_up(home, console, *services)
    before = pids(home)
    supervisor_of(home).stop("second")
    wait_until(lambda: states(home)["second"] == "stopped")
    assert stack_status(home).exit_code == 1
    bring_up(home, console, *services)
    assert states(home) == {"first": "healthy", "second": "healthy"}
    assert pids(home)["first"] == before["first"]


def test_up_with_other_settings_is_refused(home: Home, console: Console, small_service: MakeService) -> None:
    service = small_service("only")
    bring_up(home, console, service)
    other = small_service("only", "--healthy-after", "0.1", port=service.port)
    with pytest.raises(StackError, match=r"--healthy-after is not set, not 0.1(.|\n)*Stop it first"):
        bring_up(home, console, other)
    assert states(home) == {"only": "healthy"}


def test_a_service_that_dies_takes_the_others_with_it(home: Home, console: Console, small_service: MakeService) -> None:
    good = small_service("good")
    bad = small_service("bad", "--healthy-after", "60", "--die-after", "2")
    with pytest.raises(ServiceFailedError, match="bad died while it was starting") as failure:
        bring_up(home, console, good, bad)
    assert "boom: out of luck" in failure.value.log_tail
    assert_nothing_left(home)


def test_the_message_has_this_starts_log_only(home: Home, console: Console, small_service: MakeService) -> None:
    home.create()
    home.log("bad").write_text("an older line\n")
    with pytest.raises(ServiceFailedError) as failure:
        bring_up(home, console, small_service("bad", "--healthy-after", "60", "--die-after", "1"))
    assert "older" not in failure.value.log_tail


def test_a_service_that_is_never_healthy_is_given_up(home: Home, console: Console, small_service: MakeService) -> None:
    slow = small_service("slow", "--healthy-after", "3600", "--ignore-sigterm", start_timeout_s=2.0)
    with pytest.raises(ServiceFailedError, match="was not healthy within 2 s"):
        bring_up(home, console, slow)
    assert_nothing_left(home)


def test_failing_up_leaves_what_ran_before(home: Home, console: Console, small_service: MakeService) -> None:
    good = small_service("good")
    fragile = small_service("fragile")
    bring_up(home, console, good, fragile)
    before = pids(home)
    supervisor_of(home).stop("fragile")
    wait_until(lambda: states(home)["fragile"] == "stopped")
    blocker = subprocess.Popen([sys.executable, "-m", "http.server", str(fragile.port), "--bind", "127.0.0.1"])
    try:
        wait_until(lambda: _listens(fragile.port))
        with pytest.raises(ServiceFailedError, match="fragile died"):
            bring_up(home, console, good, fragile)
    finally:
        blocker.kill()
        blocker.wait()
    assert states(home) == {"good": "healthy", "fragile": "stopped"}
    assert pids(home)["good"] == before["good"]


def _listens(port: int) -> bool:
    return any(c.laddr and c.laddr.port == port and c.status == "LISTEN" for c in psutil.net_connections("tcp"))


def test_a_crashed_service_comes_back(home: Home, console: Console, small_service: MakeService) -> None:
    bring_up(home, console, small_service("only"))
    before = pids(home)["only"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: states(home)["only"] == "healthy" and pids(home)["only"] != before)
    lifecycle.down(home, console)
    assert_nothing_left(home)


def test_a_killed_service_comes_back_without_its_old_children(
    home: Home, console: Console, small_service: MakeService
) -> None:
    bring_up(home, console, small_service("first"), small_service("second"))
    old = {name: psutil.Process(pid).children() for name, pid in pids(home).items()}
    assert all(old.values())
    before = pids(home)["first"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: states(home)["first"] == "healthy" and pids(home)["first"] != before)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in old["first"])
    assert all(child.is_running() for child in old["second"]), "another service's are its own"
    lifecycle.down(home, console)


def test_a_service_that_hangs_is_seen(home: Home, console: Console, small_service: MakeService) -> None:
    bring_up(home, console, small_service("only"))
    os.kill(pids(home)["only"], signal.SIGSTOP)
    assert states(home) == {"only": "not answering"}
    assert stack_status(home).exit_code == 1
    os.kill(pids(home)["only"], signal.SIGCONT)
    assert states(home) == {"only": "healthy"}


def test_up_after_everything_was_stopped(home: Home, console: Console, small_service: MakeService) -> None:
    service = small_service("only")
    bring_up(home, console, service)
    supervisor_of(home).stop("only")
    wait_until(lambda: states(home)["only"] == "stopped")
    bring_up(home, console, small_service("other"))
    assert states(home) == {"other": "healthy"}


def test_down_after_supervisord_was_killed(home: Home, console: Console, small_service: MakeService) -> None:
    bring_up(home, console, small_service("only", "--ignore-sigterm"))
    os.kill(supervisor_of(home).pid, signal.SIGKILL)
    wait_until(lambda: len(processes_of(home)) == 2)

    status = stack_status(home)
    assert status.exit_code == 1
    assert status.num_unsupervised == 2

    lifecycle.down(home, console)
    assert "Ended 2 more processes" in console.file.getvalue()  # type: ignore[attr-defined]
    assert_nothing_left(home)


def test_up_after_supervisord_was_killed(home: Home, console: Console, small_service: MakeService) -> None:
    service = small_service("only")
    bring_up(home, console, service)
    before = pids(home)["only"]
    os.kill(supervisor_of(home).pid, signal.SIGKILL)
    bring_up(home, console, service)
    assert states(home) == {"only": "healthy"}
    assert pids(home)["only"] != before
    assert not psutil.pid_exists(before)


def test_down_when_supervisord_hangs(
    home: Home, console: Console, small_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_up(home, console, small_service("only"))
    monkeypatch.setattr("kvarena.stack.supervisord.CALL_TIMEOUT_S", 1.0)
    os.kill(supervisor_of(home).pid, signal.SIGSTOP)
    lifecycle.down(home, console)
    assert_nothing_left(home)


def test_down_removes_shared_memory_of_this_instance_only(
    home: Home, console: Console, small_service: MakeService
) -> None:
    bring_up(home, console, small_service("only"))
    ours = Path(f"/dev/shm/lmcache_l1_pool_{home.shm_name}")
    other = Path("/dev/shm/lmcache_l1_pool_kvarena-another")
    try:
        ours.write_bytes(b"x")
        other.write_bytes(b"x")
        lifecycle.down(home, console)
        assert not ours.exists()
        assert other.exists()
    finally:
        other.unlink()


def test_segments_of_dead_processes_are_removed_and_no_others(
    home: Home, console: Console, small_service: MakeService
) -> None:
    def segments(name: str) -> list[Path]:
        words = [line.split() for line in home.log(name).read_text().splitlines()]
        return [Path("/dev/shm", line[1]) for line in words if line[0] == "segment"]

    def exist(name: str) -> list[bool]:
        return [segment.exists() for segment in segments(name)]

    others = SharedMemory(create=True, size=4096)
    try:
        bring_up(home, console, small_service("first", "--segment"), small_service("second", "--segment"))
        before = pids(home)["first"]
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: exist("first") == [False, True], "its supervisor started it again")
        wait_until(lambda: states(home)["first"] == "healthy")
        lifecycle.restart("first", home, console)
        wait_until(lambda: exist("first") == [False, False, True])
        assert exist("second") == [True]
        lifecycle.down(home, console)
        assert exist("first") == [False, False, False]
        assert exist("second") == [False]
        assert Path("/dev/shm", others.name).exists()
    finally:
        others.close()
        others.unlink()


def test_a_long_home_has_its_sockets_elsewhere(
    tmp_path: Path, console: Console, small_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / ("long" * 30))
    monkeypatch.setenv("KVARENA_HOME", str(home.path))
    service = dataclasses.replace(small_service("only"), directory=str(home.path), log_path=str(home.log("only")))
    bring_up(home, console, service)
    record = read_record(home)
    assert record is not None
    run_folder = Path(record.run_folder)
    assert home.path not in run_folder.parents
    assert run_folder.stat().st_mode & 0o077 == 0, "only this user may speak to it"
    assert states(home) == {"only": "healthy"}
    lifecycle.down(home, console)
    assert not run_folder.exists()
    assert not processes_of(home)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_up_cleans_up(home: Home, small_service: MakeService, number: signal.Signals) -> None:
    home.create()
    record_of(small_service("slow", "--healthy-after", "3600")).write(home)
    with subprocess.Popen([sys.executable, "-c", UP], stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(processes_of(home)) >= 3)
        process.send_signal(number)
        assert process.wait(30) == 130
    assert_nothing_left(home)


def test_one_command_at_a_time(home: Home, console: Console) -> None:
    with home.lock(), pytest.raises(StackError, match=rf"another kvarena command \(process {os.getpid()}\)"):
        lifecycle.down(home, console)


def test_a_service_stays_on_its_cores(home: Home, console: Console, small_service: MakeService) -> None:
    cpu = min(os.sched_getaffinity(0))
    bring_up(home, console, dataclasses.replace(small_service("only"), cpus=(cpu,)))
    marked = [process for process in processes_of(home) if process.pid != supervisor_of(home).pid]
    assert [process.cpu_affinity() for process in marked] == [[cpu], [cpu]]


def test_the_log_holds_what_a_service_prints(home: Home, console: Console, small_service: MakeService) -> None:
    service = small_service("only")
    bring_up(home, console, service)
    lines = ["kvarena: starting small only", f"listening on {service.port}"]
    wait_until(lambda: tail(service.log_path, 10).splitlines() == lines)
