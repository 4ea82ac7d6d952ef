"""Asks prompts in a process of its own, with tasks shared through a folder: `FOLDER MODE STORE FILE PROMPT...`.

Prints a JSON object for each prompt: the answer's token ids, the task that was matched, and the layer passes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvarena.simllm import SimLLMInference
from support.file_store import FileStore
from support.simllm_tasks import AT_LENGTH, NUM_TOKENS


def main(folder: str, mode: str, store: str, file: str, *prompts: str) -> None:
    simllm = SimLLMInference.from_pretrained(folder, device="cpu", mode=mode, similarity_threshold=0.95)
    simllm.share_tasks(FileStore(Path(store)), file)
    for prompt in prompts:
        (answer,) = simllm.answer([prompt], NUM_TOKENS, **AT_LENGTH)
        outcome = answer.outcome
        found = {"matched": outcome.matched_task_id, "num_layer_passes": outcome.num_layer_passes}
        print(json.dumps({"token_ids": answer.token_ids, **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
