"""Shares of the cores: equal, disjoint, whole physical cores; and what the machine's tools say."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarena.stack import machine
from kvarena.stack.machine import CoreShare, parse_cpu_list, share_cores


def singles(count: int) -> list[tuple[int, ...]]:
    return [(cpu,) for cpu in range(count)]


def test_two_servers_on_two_cores() -> None:
    assert share_cores(singles(2), 2) == [CoreShare((0,), (0,)), CoreShare((1,), (1,))]


def test_the_remainder_is_left_over() -> None:
    shares = share_cores(singles(7), 2)
    assert [share.cpus for share in shares] == [(0, 1, 2), (3, 4, 5)]


def test_a_large_share_keeps_a_core_for_the_server_itself() -> None:
    assert share_cores(singles(8), 2)[0] == CoreShare((0, 1, 2, 3), (0, 1, 2), spares_core=True)


def test_hyperthreads_stay_together() -> None:
    cores = [(0, 4), (1, 5), (2, 6), (3, 7)]
    first, second = share_cores(cores, 2)
    assert first == CoreShare(cpus=(0, 1, 4, 5), omp_cpus=(4, 5))
    assert second == CoreShare(cpus=(2, 3, 6, 7), omp_cpus=(6, 7))


def test_fewer_cores_than_servers_are_shared() -> None:
    assert share_cores(singles(1), 2) == [CoreShare((0,), (0,))] * 2


@given(st.integers(1, 64), st.integers(1, 5), st.integers(1, 2))
def test_shares_are_equal_and_disjoint(num_cores: int, num_servers: int, threads: int) -> None:
    cores = [tuple(range(core * threads, (core + 1) * threads)) for core in range(num_cores)]
    shares = share_cores(cores, num_servers)
    assert len(shares) == num_servers
    assert len({len(share.cpus) for share in shares}) == 1
    assert len({len(share.omp_cpus) for share in shares}) == 1
    for share in shares:
        assert share.omp_cpus
        assert set(share.omp_cpus) <= set(share.cpus)
    if num_cores >= num_servers:
        taken = [cpu for share in shares for cpu in share.cpus]
        assert len(taken) == len(set(taken))


def test_physical_cores_are_what_this_process_may_use() -> None:
    cores = machine.physical_cores()
    assert sorted(cpu for core in cores for cpu in core) == sorted(os.sched_getaffinity(0))


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("0,2-4\n", (0, 2, 3, 4)), ("5-5", (5,))])
def test_parse_cpu_list(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus


def test_vllm_reads_our_notation() -> None:
    ompmultiprocessing = pytest.importorskip("vllm.utils.cpu_resource_utils")
    share = share_cores(singles(8), 2)[1]
    assert ompmultiprocessing.parse_id_list(",".join(map(str, share.omp_cpus))) == list(share.omp_cpus)


def _fake_nvidia_smi(folder: Path, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    _fake_nvidia_smi(tmp_path, "echo 0; echo 1")
    assert machine.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.visible_gpus() == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.visible_gpus() == []


LISTED = """\
0, NVIDIA H100 80GB HBM3, 81559, 80987, 580.95.05, 9.0
1, NVIDIA GB10, [N/A], [N/A], 580.95.05, 12.1
"""


def test_what_nvidia_smi_tells_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CSV without header and units; memory that a GPU shares with the processor isn't told."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "listed").write_text(LISTED)
    asked = "--query-gpu=index,name,memory.total,memory.free,driver_version,compute_cap --format=csv,noheader,nounits"
    _fake_nvidia_smi(tmp_path, f'[ "$*" = "{asked}" ] && cat {tmp_path}/listed')
    assert machine.gpus() == [
        machine.GPU(0, "NVIDIA H100 80GB HBM3", 81559, 80987, "580.95.05", "9.0"),
        machine.GPU(1, "NVIDIA GB10", None, None, "580.95.05", "12.1"),
    ]


def test_a_driver_that_does_not_work_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    _fake_nvidia_smi(tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert machine.visible_gpus() == []


def test_memory_under_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    unlimited = machine.available_memory_bytes()
    assert unlimited > 0
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    assert machine.available_memory_bytes() == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory_bytes() > 400


def test_no_compiler_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not machine.has_compiler()
