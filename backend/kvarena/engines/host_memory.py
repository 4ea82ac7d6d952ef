"""Main memory for KV that goes back to the system as soon as nobody holds it.

The C library keeps what was freed in between other blocks; with entries of every size coming and going, a process grows
to several times what it holds. A mapping of its own has no such neighbours.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

SMALLEST_MAPPING_BYTES = 1 << 16


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor; small ones come from the usual place."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < SMALLEST_MAPPING_BYTES:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(tuple(shape))
