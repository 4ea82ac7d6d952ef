"""The real thing: `kvarena up` with vLLM and the town model, as a person types it, to the last process gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from kvarena.home import Home
from kvarena.stack.machine import physical_cores, share_cores
from kvarena.stack.processes import processes_of, stop_leftovers
from support.request_lines import lines_of
from support.running_stack import KVARENA, Stack, free_port_base
from support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
pytest.importorskip("vllm")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, _own_environment: None) -> None:
    for key, value in {"KV_CACHE_GB": "1", "LMCACHE_GB": "0.5", "PROFILE": "cpu", "MODEL": "town"}.items():
        monkeypatch.setenv(key, value)


@pytest.fixture(scope="module")
def module_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("stack") / "home")
    yield home
    stop_leftovers(home)


@pytest.fixture(scope="module")
def port_base() -> int:
    return free_port_base()


def kvarena(home: Home, *arguments: str, api_key: str = "") -> subprocess.CompletedProcess[str]:
    return Stack(home.path, api_key).command(*arguments, timeout_s=600)


def up_plain(home: Home, port_base: int, *more: str) -> subprocess.CompletedProcess[str]:
    return kvarena(home, "up", "--contenders", "plain", "--no-ui", "--port-base", str(port_base), *more)


@contextmanager
def alone(home: Home, name: str, port_base: int) -> Iterator[httpx.Client]:
    """A contender that needs no vLLM, up by itself until the end of the block, and then down with nothing left."""
    try:
        up = kvarena(home, "up", "--contenders", name, "--no-ui", "--port-base", str(port_base))
        assert up.returncode == 0, up.stdout + up.stderr
        with Stack(home.path).client(name) as http:
            yield http
    finally:
        assert kvarena(home, "down").returncode == 0
    assert_nothing_left(home)


def assert_nothing_left(home: Home) -> None:
    assert not processes_of(home)
    assert not list(Path("/dev/shm").glob(f"*{home.shm_name}*"))
    assert kvarena(home, "status").returncode == 3


def test_from_up_to_down(module_home: Home, port_base: int) -> None:
    home = module_home
    url = f"http://127.0.0.1:{port_base + 1}"

    started = up_plain(home, port_base)
    assert started.returncode == 0, started.stderr + started.stdout
    assert "plain (vLLM without LMCache): healthy" in started.stdout
    assert url in started.stdout

    request = {"model": "town", "prompt": "You answer questions", "max_tokens": 3, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=request, timeout=60).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] == 3
    assert httpx.get(f"{url}/kvarena").status_code == 404

    status = kvarena(home, "status", "--json")
    assert status.returncode == 0
    (plain,) = json.loads(status.stdout)["services"]
    assert (plain["name"], plain["state"], plain["address"]) == ("plain", "healthy", url)
    _check_worker(plain["pid"])
    doctor = kvarena(home, "doctor", "--json")
    assert json.loads(doctor.stdout)["facts"]["stack"] == "processes: plain up"

    again = up_plain(home, port_base)
    assert again.returncode == 0
    assert json.loads(kvarena(home, "status", "--json").stdout)["services"][0]["pid"] == plain["pid"]
    other = up_plain(home, port_base, "--max-model-len", "512")
    assert other.returncode == 1
    assert "--max-model-len is not set, not 512" in other.stderr

    assert "Application startup complete" in kvarena(home, "logs", "plain", "-n", "40").stdout

    shared_memory = _shared_memory_of(home)
    assert shared_memory
    stopped = kvarena(home, "down")
    assert stopped.returncode == 0
    assert "Stopped: plain." in stopped.stdout
    assert_nothing_left(home)
    assert not [path for path in shared_memory if path.exists()]


def _check_worker(pid: int) -> None:
    """vLLM alone has every core. Its OpenMP threads are bound to one each where one is left beside them; where none is,
    the engine's process runs the worker.
    """
    usable = os.sched_getaffinity(0)
    running = {child.pid: " ".join(child.cmdline()) for child in psutil.Process(pid).children(recursive=True)}
    workers = [pid for pid, words in running.items() if "Worker" in words]
    (worker,) = workers or [pid for pid, words in running.items() if "EngineCore" in words]
    bound = {frozenset(os.sched_getaffinity(thread.id)) for thread in psutil.Process(worker).threads()}
    assert all(cpus <= usable for cpus in bound)
    binds_threads = share_cores(physical_cores(), 1)[0].spares_core
    assert any(len(cpus) == 1 for cpus in bound) == bool(workers) == binds_threads


def _shared_memory_of(home: Home) -> set[Path]:
    """The files in shared memory that the instance's processes have open."""
    return {
        Path(mapped.path)
        for process in processes_of(home)
        for mapped in process.memory_maps()
        if mapped.path.startswith("/dev/shm/")
    }


def test_a_vllm_that_cannot_start(module_home: Home, port_base: int) -> None:
    failed = up_plain(module_home, port_base, "--max-model-len", "1000000")
    assert failed.returncode == 1
    assert "error: plain died while it was starting" in failed.stderr
    assert "User-specified max_model_len (1000000) is greater" in failed.stderr
    assert 5 < len(failed.stderr.splitlines()) < 40
    assert_nothing_left(module_home)


def test_the_prefix_contender(tmp_path: Path, port_base: int) -> None:
    """Asked twice, its cache at work, the request in its log."""
    home = Home(tmp_path / "home")
    with alone(home, "prefix", port_base) as http:
        chat = {
            "model": "town",
            "messages": [{"role": "user", "content": "Bruno plays the lute . " * 10 + "What does Bruno play ?"}],
            "max_tokens": 4,
        }
        answers = [http.post("/v1/chat/completions", json=chat | {"temperature": 0}).json() for _ in range(2)]
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert cached == [0, answers[0]["usage"]["prompt_tokens"]]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert http.get("/cache/stats").json()["hits"] == 1
        lines = lines_of(kvarena(home, "logs", "prefix").stdout)
        assert [line["details"]["prefix_cache_hit"] for line in lines] == [False, True]


def test_a_running_stack_keeps_the_key_that_it_was_started_with(tmp_path: Path, port_base: int) -> None:
    home = Home(tmp_path / "home")
    arguments = ("up", "--contenders", "prefix", "--no-ui", "--port-base", str(port_base))
    try:
        for key, exit_code, message in (
            ("first", 0, ""),
            ("second", 1, "error: prefix is running with another KVARENA_API_KEY: set the one"),
            ("", 1, "KVARENA_API_KEY is set for what runs"),
            ("first", 0, ""),
        ):
            up = kvarena(home, *arguments, api_key=key)
            assert up.returncode == exit_code, up.stdout + up.stderr
            assert message in up.stderr
            assert kvarena(home, "status").returncode == 0, "what runs goes on"
    finally:
        assert kvarena(home, "down").returncode == 0
    assert_nothing_left(home)


def test_the_simllm_contender(tmp_path: Path, port_base: int) -> None:
    """Two similar questions, the second over the first one's KV, and the figures."""
    home = Home(tmp_path / "home")
    notes = "Bruno plays the lute . Mara keeps a goat . " * 10
    with alone(home, "simllm", port_base) as http:
        reports = []
        for question in ("What does Bruno play ?", "What does Mara keep ?"):
            chat = {"model": "town", "messages": [{"role": "user", "content": notes + question}], "max_tokens": 4}
            answer = http.post("/v1/chat/completions", json=chat | {"temperature": 0}).json()
            reports.append(answer["kv_transfer_params"]["kvarena"])
        assert http.get("/tasks/stats").json()["num_hits"] == 1
        assert 'kvarena_store_lookups_total{engine="0",model_name="town",outcome="hits"} 1' in (
            http.get("/metrics").text.replace('model_name="town",engine="0"', 'engine="0",model_name="town"')
        )
        assert [report["hit"] for report in reports] == [False, True]
        assert "What does Bruno play ?" in reports[1]["matched_prompt"]
        assert reports[1]["num_layer_passes"] < reports[1]["num_layer_passes_without_reuse"]
        log = kvarena(home, "logs", "simllm").stdout
        assert [line["details"]["hit"] for line in lines_of(log)] == [False, True]
        assert "lute" not in log


def test_the_ai100_contender(tmp_path: Path, port_base: int) -> None:
    """A turn and its follow-up, and the slots."""
    home = Home(tmp_path / "home")
    notes = "Bruno plays the lute . Mara keeps a goat . " * 10
    with alone(home, "ai100", port_base) as http:
        reports = []
        for question in (notes + "What does Bruno play ?", "And what does Mara play ?"):
            chat = {"model": "town", "session_id": "a", "messages": [{"role": "user", "content": question}]}
            answer = http.post("/v1/chat/completions", json=chat | {"temperature": 0, "max_tokens": 4}).json()
            reports.append(answer["kv_transfer_params"]["kvarena"])
        table = http.get("/slots").json()
        first, second = reports
        assert [report["status"] for report in reports] == ["NEW_TOPIC", "INCREMENTAL_PREFILL"]
        assert first["topic"] == second["topic"]
        assert second["num_prefilled_tokens"] < first["num_prefilled_tokens"]
        assert [slot["topic"] for slot in table["slots"]] == [first["topic"], None, None, None]
        lines = lines_of(kvarena(home, "logs", "ai100").stdout)
        assert [line["details"]["status"] for line in lines] == ["NEW_TOPIC", "INCREMENTAL_PREFILL"]


def test_simllm_refuses_another_kind_of_model_before_anything_starts(tmp_path: Path, port_base: int) -> None:
    home, folder = Home(tmp_path / "home"), tmp_path / "mistral"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    arguments = ("--contenders", "simllm", "--no-ui", "--port-base", str(port_base), "--model", str(folder))
    up = kvarena(home, "up", *arguments)
    assert up.returncode == 1
    assert "simllm needs a model of type llama" in up.stderr
    assert "of type mistral" in up.stderr
    assert_nothing_left(home)


def test_a_second_tier_that_cannot_be_written_is_refused_before_anything_starts(
    module_home: Home, port_base: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_L2", "/proc/chunks")
    up = kvarena(module_home, "up", "--contenders", "blend", "--no-ui", "--port-base", str(port_base))
    assert up.returncode == 1
    assert "LMCACHE_L2 is the folder /proc/chunks, which can't be made or written" in up.stderr
    assert "starting" not in up.stdout
    assert_nothing_left(module_home)


def test_ctrl_c(module_home: Home, port_base: int) -> None:
    arguments = ("up", "--contenders", "plain", "--no-ui", "--port-base", str(port_base))
    environment = Stack(module_home.path).environment
    with subprocess.Popen(
        [KVARENA, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_until(lambda: len(processes_of(module_home)) >= 3, timeout_s=300)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopping what was started." in output
    assert_nothing_left(module_home)


def test_lmcache_comes_back_after_it_was_killed(module_home: Home, port_base: int) -> None:
    """Its shared memory is still there then, and is taken over."""
    from rich.console import Console

    from kvarena.stack import lifecycle
    from kvarena.stack.plan import make_plan
    from kvarena.stack.record import Record
    from kvarena.stack.services import build_services
    from kvarena.stack.settings import load_settings
    from kvarena.stack.status import stack_status

    settings = load_settings(Path("none"), contenders="blend", profile="cpu", port_base=port_base, lmcache_gb=0.5)
    lmcache = build_services(make_plan(settings, module_home), module_home)[0]
    assert lmcache.name == "lmcache-server"
    record = Record((lmcache,), "", "data", "town")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVARENA_HOME", str(module_home.path))
        lifecycle.bring_up(record, module_home, Console(), check=lambda missing: None, secrets={})
    before = stack_status(module_home).services[0]
    assert list(Path("/dev/shm").glob(f"*{module_home.shm_name}*"))
    os.kill(before.pid, signal.SIGKILL)

    def is_back() -> bool:
        now = stack_status(module_home).services[0]
        return now.state == "healthy" and now.pid != before.pid

    wait_until(is_back)
    lifecycle.down(module_home, Console())
    assert_nothing_left(module_home)


def test_vllms_own_command_line(module_home: Home) -> None:
    bench = kvarena(module_home, "vllm", "bench", "serve", "--help")
    assert bench.returncode == 0
    assert "Benchmark the online serving throughput" in bench.stdout


def test_ai100s_demo_is_a_page_on_a_port_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, base = Home(tmp_path / "home"), free_port_base()
    monkeypatch.setenv("PORT_BASE", str(base))
    try:
        done = kvarena(home, "ai100", "demo", "--model", "town", "--port", str(base + 9))
        assert done.returncode == 0, done.stdout + done.stderr
        address = f"http://127.0.0.1:{base + 9}/conversations"
        assert address in done.stdout
        assert httpx.get(address).status_code == 200
        status = json.loads(kvarena(home, "status", "--json").stdout)
        assert {service["name"] for service in status["services"]} == {"ai100", "page"}
    finally:
        kvarena(home, "down")
        stop_leftovers(home)
