"""What a device needs of this process: threads that start on it, memory that it reads fast, and what its errors mean.

Not here: what runs on it.
"""

from __future__ import annotations

import os
from contextlib import suppress

import torch

_FAILURES = ("out of memory", "CUDA error", "NCCL error")
"""What PyTorch, cuBLAS and vLLM say of a device's failures, in errors that have no class of their own."""


def is_device_failure(error: BaseException) -> bool:
    """Whether a device had no memory or failed otherwise: after that its rank can't be sure to go on as the others do.
    PyTorch's allocator has an error of its own for it; libraries beneath it don't tell want of memory from the rest.
    """
    own = (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistBackendError)
    return isinstance(error, own) or (isinstance(error, RuntimeError) and any(said in str(error) for said in _FAILURES))


def begin_thread(device: torch.device | None = None) -> None:
    """To be called first in a thread of one's own. It runs on every core that a thread of this process may use: vLLM
    binds each of its threads to a core, and one that they start inherits that, and would wait for the thread that it is
    to relieve. What it does on CUDA it does on `device`: a new thread begins on the first GPU, whichever its maker is
    on.
    """
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            cores |= os.sched_getaffinity(int(thread))
    os.sched_setaffinity(0, cores)
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in main memory: itself if it is there, else a copy, pinned if a GPU will read it back: those transfers
    are several times as fast.
    """
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda").copy_(tensor)


def wait_for(device: torch.device) -> None:
    """Returns when what this thread launched on the device has ended; on a CPU it has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
