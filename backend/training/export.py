"""Writes a run's model for Hugging Face and vLLM: `python backend/training/export.py --name town`.

Checks that `transformers` loads it and computes what the training model computes.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

import torch
from evaluate import MIX
from rows import make_batch
from tokenizer import BOS_ID, EOS_ID, PAD_ID
from train import CHECKPOINT, Training
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from settings import MIDDLE, RUNS, Settings

PROFILE = {"separator": "<note>", "policy": "kv_deviation", "ratio": 0.1, "check_layer": 2, "deviation": "values"}
TOLERANCE = 2e-3


def export(training: Training, folder: Path) -> None:
    """bfloat16 safetensors, tokenizer with chat template, and the settings that suit the model (kvarena.json)."""
    model = hugging_face_model(training)
    check_equal(training, model)
    model.to(torch.bfloat16).save_pretrained(folder)
    training.tokenizer.save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID).save_pretrained(folder)
    (folder / "kvarena.json").write_text(json.dumps(PROFILE) + "\n")
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)


def hugging_face_model(training: Training) -> LlamaForCausalLM:
    """The same weights, in float32."""
    config = asdict(training.model.config)
    model = LlamaForCausalLM(
        LlamaConfig(
            rope_parameters={"rope_type": "default", "rope_theta": config.pop("rope_theta")},
            **config,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
    )
    state = training.model.state_dict()
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model.eval()


@torch.no_grad()
def check_equal(training: Training, model: LlamaForCausalLM) -> None:
    """Raises `ValueError` if a context's logits differ by more than rounding."""
    batch = make_batch(training.coder, MIDDLE, MIX, random.Random(0))
    length = int((batch.labels[0, : MIDDLE.context_tokens] == 0).sum()) + 1
    ours = training.model.logits(training.model(batch.ids, batch.positions, batch.branch_mask))[0, :length]
    theirs = model(batch.ids[:1, :length]).logits[0]
    if (difference := float((ours - theirs).abs().max())) > TOLERANCE:
        raise ValueError(f"the exported model's logits differ by {difference:.4f}; at most {TOLERANCE} is rounding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="town", help="the run's folder below backend/training/runs")
    parser.add_argument("--output", type=Path, help="where to (default: the folder export of the run)")
    arguments = parser.parse_args()
    run = RUNS / arguments.name
    if not (run / CHECKPOINT).is_file():
        parser.error(f"there is no run at {run}; train it first with train.py --name {arguments.name}")
    training = Training(run, Settings.load(run), torch.device("cpu"))
    output = arguments.output or run / "export"
    export(training, output)
    size = (output / "model.safetensors").stat().st_size
    num_parameters = sum(parameter.numel() for parameter in training.model.parameters()) / 1e6
    print(f"{output}: {num_parameters:.2f}M parameters, {size / 1e6:.1f} MB, {training.progress.num_tokens:,} tokens")


if __name__ == "__main__":
    main()
