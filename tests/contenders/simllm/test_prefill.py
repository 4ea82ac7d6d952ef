"""What is prefilled in pieces and what is run at all, counted; and KV that grows without copies."""

from __future__ import annotations

import json
import random
from pathlib import Path
from shutil import copytree

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from kvarena.contenders.simllm.engine import TaskPrefiller
from kvarena.contenders.simllm.modeling import GrowingLayer
from kvarena.policies.params import BlendParams
from support.simllm_tasks import Tasks
from support.tiny_models import random_text


@pytest.mark.parametrize("mode", ["top_layer", "sandwich", "aligned"])
def test_a_miss_goes_in_pieces_and_a_hit_of_top_layer_in_one(folder: Path, mode: str) -> None:
    tasks = Tasks.load(folder, mode=mode, similarity_threshold=0.99)
    model = tasks.simllm.model
    model.piece_tokens = 16
    prefiller = TaskPrefiller(model, tasks.simllm.aligned, tasks.simllm.params.end_layers_of(mode))
    ids = tasks.encode(random_text(random.Random(0), 40))
    before = model.num_forwards
    first = prefiller.prefill(ids, "first", 4)
    assert model.num_forwards - before == -(-len(ids) // 16)
    assert first.outcome.num_layer_passes == 4 * len(ids)
    with torch.no_grad():
        expected = tasks.reference(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(first.logits, expected, atol=1e-4, rtol=1e-4)
    before = model.num_forwards
    again = prefiller.prefill(ids, "again", 4)
    assert model.num_forwards - before == 1
    assert again.outcome.matched_task_id == "first"
    assert again.outcome.num_layer_passes == {"top_layer": len(ids), "sandwich": 4 * len(ids), "aligned": 4}[mode]
    assert again.num_positions == (1 if mode == "aligned" else 2) * len(ids)
    tasks.simllm.close()


def test_a_growing_layer_holds_what_a_dynamic_one_does() -> None:
    growing, dynamic = GrowingLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    places = set()
    for num_tokens in [40, *[1] * 150, 7]:
        keys, values = torch.randn(2, 3, 2, num_tokens, 8, generator=generator)
        for mine, stock in zip(growing.update(keys, values), dynamic.update(keys, values), strict=True):
            assert torch.equal(mine, stock)
        assert growing.get_seq_length() == dynamic.get_seq_length()
        places.add(growing.keys.data_ptr())
    assert len(places) <= 3, "197 tokens were moved twice at most"


def test_a_models_profile_says_how_to_blend(folder: Path, tmp_path: Path) -> None:
    profiled = copytree(folder, tmp_path / "model")
    (profiled / "kvarena.json").write_text(json.dumps({"policy": "random", "ratio": 0.3}))
    for path, expected in [(profiled, BlendParams("random", 0.3)), (folder, BlendParams())]:
        tasks = Tasks.load(path, mode="aligned")
        assert tasks.simllm.params.aligned.blend == expected
        tasks.simllm.close()
