"""What `kvarena doctor` says of this machine, and of GPUs by what nvidia-smi would say."""

from __future__ import annotations

import json
import re
import socket
from functools import partial
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvarena.cli import app
from kvarena.contenders.servers import GIB
from kvarena.home import Home
from kvarena.model import DEFAULT_CPU_MODEL
from kvarena.stack import containers, machine, preflight
from kvarena.stack.doctor import Diagnosis, diagnose, show_diagnosis
from kvarena.stack.plan import Plan
from kvarena.stack.settings import CONTENDERS, DEFAULT_PORTS, load_settings
from support.running_stack import free_port_base


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")


def diagnosis(home: Home, tmp_path: Path, **chosen: object) -> Diagnosis:
    given = {"profile": "cpu", "port_base": free_port_base()} | chosen
    return diagnose(partial(load_settings, tmp_path / ".env", **given), home)


def problems(found: Diagnosis) -> dict[str, str]:
    return {check.name: check.problem for check in found.checks if check.problem}


def test_this_machine(home: Home, tmp_path: Path, console: Console) -> None:
    found = diagnosis(home, tmp_path, lmcache_gb=0.1)
    assert found.is_ready, problems(found)
    assert machine.cpu_name() in found.facts["processor"]
    assert f"of {psutil.virtual_memory().total / GIB:.1f} GiB" in found.facts["memory"]
    assert found.facts["stack"] == "doesn't run"
    assert found.facts["hub"] == "http://127.0.0.1:9 can't be reached (ConnectError)"
    assert set(found.versions) >= {"python", "kvarena", "torch", "transformers", "lmcache"}
    assert len(found.ports) == len(DEFAULT_PORTS)
    assert set(found.ports.values()) == {"free"}
    assert "kv_deviation, ratio " in found.wanted["blend"]
    assert DEFAULT_CPU_MODEL in found.wanted["notice"], "nothing was fetched into this home yet"
    assert [each.name for each in found.contenders] == list(CONTENDERS)
    show_diagnosis(found, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "GPUs                 none that a driver shows" in shown or found.gpus
    assert "packages             ok" in shown


def test_a_taken_port_and_its_holder(home: Home, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        found = diagnosis(home, tmp_path, port_base=None, plain_port=port, contenders="plain")
    assert not found.is_ready
    assert found.ports[f"plain {port}"].endswith(f"(process {psutil.Process().pid})")
    assert problems(found)["ports"].startswith(f"port {port} for plain is taken by ")


def test_every_check_is_told_not_only_the_first(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: GIB)
    found = diagnosis(home, tmp_path, data_dir=tmp_path / "nowhere", model="org/absent", local_hf_home=tmp_path)
    assert set(problems(found)) == {"documents", "model", "memory"}
    assert "org/absent is not on this machine" in problems(found)["model"]


def test_a_contender_that_cant_run_says_why(home: Home, tmp_path: Path) -> None:
    model = tmp_path / "qwen"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen3"}')
    found = diagnosis(home, tmp_path, model=str(model))
    (simllm,) = (each.problem for each in found.contenders if each.name == "simllm")
    assert "simllm needs a model of type llama" in simllm
    assert found.is_ready, "which isn't among the default ones"


def test_a_machine_with_gpus(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    gpu = machine.GPU(0, "NVIDIA H100 80GB HBM3", 81559, 80987, "580.95.05", "9.0")
    monkeypatch.setattr(machine, "gpus", lambda: [gpu])
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0"])
    monkeypatch.setattr(machine, "installed_vllm", lambda: "gpu")
    monkeypatch.setattr(preflight, "find_spec", lambda name: object())
    found = diagnosis(home, tmp_path, profile="auto", run_in="processes", model="town")
    assert found.wanted["plain"].startswith("GPU 0, port ")
    assert found.is_ready, problems(found)
    show_diagnosis(found, console)
    line = (
        "GPU 0                NVIDIA H100 80GB HBM3, 80987 of 81559 MiB free, driver 580.95.05, compute capability 9.0"
    )
    assert line in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("free_mib", "weight_gib", "chosen", "problem"),
    [
        (23_000, 1, {}, ""),
        (20_000, 1, {}, r"GPU 0 .* has 19.5 GiB of 24.0 GiB free, and blend and plain would take 21.6 GiB"),
        (20_000, 1, {"kv_cache_gb": 8}, ""),
        (20_000, 2, {"kv_cache_gb": 8}, "would take 20.0 GiB .weights 2.0 GiB each"),
        (23_000, 14, {}, "a server's share is 10.8 GiB: less than the model's weights of 14.0 GiB"),
    ],
)
def test_what_doesnt_fit_into_a_gpu_is_told(
    free_mib: int,
    weight_gib: int,
    chosen: dict[str, object],
    problem: str,
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = machine.GPU(0, "NVIDIA L4", 24 * 1024, free_mib, "580.95.05", "8.9")
    monkeypatch.setattr(machine, "gpus", lambda: [gpu])
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0"])
    monkeypatch.setattr(Plan, "weight_bytes", weight_gib * GIB)
    found = diagnosis(
        home, tmp_path, profile="gpu", run_in="processes", model="town", contenders="blend,plain", **chosen
    )
    told = problems(found).get("GPU memory", "")
    assert re.search(problem, told) if problem else told == ""


@pytest.mark.parametrize(
    ("settings", "check", "problem"),
    [
        ({"PROFILE": "gpu"}, "plan", "nvidia-smi shows no GPU on this machine"),
        ({"BLEND_RATIO": "2"}, "settings", "BLEND_RATIO must be less than or equal to 1"),
    ],
)
def test_settings_that_cant_be(
    home: Home, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], check: str, problem: str
) -> None:
    """Through the command, whose exit status says it too; and the facts are there all the same."""
    monkeypatch.setattr(machine, "visible_gpus", list)
    monkeypatch.setattr(containers, "engine_answers", lambda: False)
    for key, value in ({"RUN_IN": "processes"} | settings).items():
        monkeypatch.setenv(key, value)
    ran = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(ran.stdout)
    assert ran.exit_code == 1
    assert not found["ready"]
    assert found["facts"]["processor"]
    (told,) = found["checks"]
    assert told["name"] == check
    assert problem in told["problem"]


def test_a_token_is_not_shown(home: Home, tmp_path: Path) -> None:
    found = diagnosis(home, tmp_path, hf_token="hf_secret")
    assert found.facts["token"] == "HF_TOKEN"
    assert "hf_secret" not in json.dumps(found.to_json())
