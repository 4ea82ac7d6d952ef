"""The process itself stays within the budget plus one request, whatever the sizes of what comes and goes."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from kvarena.contenders.prefix.engine import PrefixEngine
from kvarena.engines.base import GenerationRequest, Sampling
from kvarena.engines.hf.model import HFModel
from support.tiny_models import save_tiny_model

MIB = 2**20
BUDGET_BYTES = 48 * MIB
LONGEST_TOKENS = 300
NOISE_BYTES = 24 * MIB


def test_resident_size_over_hundreds_of_prompts(tmp_path: Path) -> None:
    """In a process of its own, which has freed nothing before."""
    much_kv: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
    much_kv |= {"num_hidden_layers": 2, "num_key_value_heads": 4}
    folder = save_tiny_model(tmp_path, **much_kv, head_dim=256)
    process = subprocess.run(
        [sys.executable, "-c", f"import test_memory; test_memory.measure({str(folder)!r})"],
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    growth_bytes, one_request_bytes, num_evictions = map(int, process.stdout.split()[-3:])
    assert num_evictions > 150
    assert growth_bytes < BUDGET_BYTES + one_request_bytes + NOISE_BYTES


def measure(folder: str) -> None:
    model = HFModel.load(folder, device="cpu")
    engine = PrefixEngine(model, "m", cache_bytes=BUDGET_BYTES)
    rng, resident = random.Random(0), psutil.Process().memory_info

    def ask(num_tokens: int) -> None:
        prompt = tuple(rng.choices(range(5, 300), k=num_tokens))
        list(engine.generate(GenerationRequest("r", prompt, Sampling(max_tokens=2, temperature=0.0))))

    for _ in range(30):  # what the libraries keep for themselves
        ask(rng.randint(30, LONGEST_TOKENS))
    engine.cache.clear()
    before, most = resident().rss, 0
    for _ in range(500):
        ask(rng.randint(30, LONGEST_TOKENS))
        most = max(most, resident().rss)
    print(most - before, model.kv_shape.empty(LONGEST_TOKENS).nbytes, engine.cache.stats().evictions)
