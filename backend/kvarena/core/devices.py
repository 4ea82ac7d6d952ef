"""What a device asks of this process: threads that start on it, memory that it reads fast, waiting, and its errors."""

from __future__ import annotations

import os
from contextlib import suppress

import torch

_FAILURES = ("out of memory", "CUDA error", "NCCL error")
"""What PyTorch, cuBLAS and vLLM say of a device's failures, in errors that have no class of their own."""


def is_device_failure(error: BaseException) -> bool:
    """Whether a device had no memory or failed otherwise: after that its rank may no longer do what the others do.
    PyTorch's allocator has an error of its own for it; the libraries below it don't tell lack of memory from the rest.
    """
    own = (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistBackendError)
    return isinstance(error, own) or (isinstance(error, RuntimeError) and any(said in str(error) for said in _FAILURES))


def begin_thread(device: torch.device | None = None) -> None:
    """To be called first in every thread that we start. It may then run on all cores of this process: vLLM binds each
    of its threads to a core, and a thread that such a one starts inherits that, and would wait for its maker. Its CUDA
    work goes to `device`: a new thread begins on the first GPU, whichever its maker uses.
    """
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            cores |= os.sched_getaffinity(int(thread))
    os.sched_setaffinity(0, cores)
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in main memory: itself if it is there, else a copy. One from a GPU is pinned, for it goes back several
    times as fast.
    """
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda").copy_(tensor)


def wait_for(device: torch.device) -> None:
    """Returns when what this thread launched on the device has ended; on a CPU it has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
