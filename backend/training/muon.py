"""Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) in single precision, many matrices at a time.

`torch.optim.Muon` does the same one matrix at a time and in bfloat16, which is slow on CPUs without bfloat16 units.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: every direction of a matrix is learned at the same rate."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, num_iterations: int = 5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "num_iterations": num_iterations})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever called
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(tuple(param.shape), []).append(param)
            for params in by_shape.values():
                self._step_equal(params, group)

    def _step_equal(self, params: list[Tensor], group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        updates = []
        for param in params:
            assert param.grad is not None, "only parameters with a gradient are collected"
            state = self.state[param]
            if not state:
                state["momentum"] = torch.zeros_like(param)
            state["momentum"].lerp_(param.grad, 1 - momentum)
            updates.append(param.grad.lerp(state["momentum"], momentum))
        num_rows, num_columns = params[0].shape
        rate = group["lr"] * max(1.0, num_rows / num_columns) ** 0.5
        orthogonal = orthogonalize(torch.stack(updates), group["num_iterations"])
        for param, update in zip(params, orthogonal, strict=True):
            param.add_(update, alpha=-rate)


def orthogonalize(matrices: Tensor, num_iterations: int) -> Tensor:
    """Newton-Schulz: (N, rows, columns) with singular values all near 1. Iterates on the small Gram side only."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
