"""Drawing from logits."""

from __future__ import annotations

import pytest
import torch

from kvarena.engines.base import Sampling
from kvarena.engines.sampling import LEAST_TEMPERATURE, Sampler

LOGITS = torch.tensor([-700.0, 12.5, 900.0, 899.5])


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-9, LEAST_TEMPERATURE, 0.01])
def test_the_smallest_temperatures_draw_the_likeliest_token(temperature: float) -> None:
    sampler = Sampler(Sampling(max_tokens=1, temperature=temperature), torch.device("cpu"))
    assert {sampler.draw(LOGITS).token_id for _ in range(20)} == {2}
