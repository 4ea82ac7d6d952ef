"""What is copied from a device, and which of its errors end a rank; devices are patched in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from kvarena.core.devices import is_device_failure, to_host


@pytest.mark.parametrize(("kind", "is_pinned"), [("cuda", True), ("xpu", False)])
def test_a_copy_from_a_gpu_is_pinned(kind: str, is_pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def empty(_shape: object, **how: Any) -> Any:
        made.append(how)
        return SimpleNamespace(copy_=lambda other: ("copy", other))

    tensor = SimpleNamespace(device=torch.device(kind), shape=(2,), dtype=torch.float16)
    monkeypatch.setattr(torch, "empty", empty)
    assert to_host(cast("torch.Tensor", tensor)) == ("copy", tensor)
    assert made == [{"dtype": torch.float16, "pin_memory": is_pinned}]


def test_what_is_in_main_memory_stays_where_it_is() -> None:
    tensor = torch.ones(2)
    assert to_host(tensor) is tensor


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (torch.distributed.DistBackendError("NCCL error in: ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("NCCL error: unhandled cuda error"), True),
        (RuntimeError("the size of tensor a must match the size of tensor b"), False),
        (ConnectionError("CUDA error"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_of_a_device(error: Exception, is_one: bool) -> None:
    assert is_device_failure(error) == is_one
