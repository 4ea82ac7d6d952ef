"""Chunks computed after the very chunk before them, compared with chunks computed by themselves.

    python examples/research/seam_study.py --num-questions 10 > seams.md

SmolLM2-135M-Instruct in fp32, the shipped documents in the folder's order, eight neighbouring chunks around the one
that a question needs. Teacher-forced as selection_study.py, whose study this goes by; the table in docs/quality.md is
from here. None of it needs a server.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from selection_study import Study, Table

from kvarena.bench.quality.questions import EvalQuestion, load_questions
from kvarena.documents import TextChunk
from kvarena.engines.hf.blend import HFBlender
from kvarena.model import find_model
from kvarena.policies.params import BlendParams, make_policy, read_blend_profile
from kvarena.splitting import Splitter
from kvarena.stores.memory import MemoryStore

NUM_CHUNKS = 8
SHARES = (0.05, 0.1)
POLICIES = {"chunk_head": BlendParams("chunk_head"), "values, layer 3": BlendParams(check_layer=3, deviation="values")}
IsSeam = Callable[[TextChunk, TextChunk], bool]
"""Of a chunk and the one after it: whether the second is computed after the first."""


def same_document(before: TextChunk, chunk: TextChunk) -> bool:
    return before.name.split("-")[0] == chunk.name.split("-")[0]


def blender_with_seams(study: Study, context: Sequence[TextChunk], is_seam: IsSeam) -> HFBlender:
    """Over a store of its own, in which some chunks of this context are as they are after the one before."""
    blender = HFBlender(study.model, MemoryStore(4 << 30), separator=study.separator, seams=True)
    blender.prefill(study.over(context), BlendParams("none"), 0)
    for before, chunk in itertools.pairwise(context):
        if is_seam(before, chunk):
            blender.make_seams(study.over([before, chunk]))
    return blender


def around(chunks: Sequence[TextChunk], question: EvalQuestion) -> list[TextChunk]:
    """Neighbours in the folder, the chunk that the question needs among them."""
    names = [chunk.name for chunk in chunks]
    place = names.index(question.needs[0]) if question.needs else 0
    low = max(0, min(place - NUM_CHUNKS // 2, len(chunks) - NUM_CHUNKS))
    return list(chunks[low : low + NUM_CHUNKS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, default=Path("data/questions.jsonl"))
    parser.add_argument("--num-questions", type=int, default=10)
    options = parser.parse_args()
    study = Study(None, read_blend_profile(find_model(None, "cpu").name).get("separator", "\n\n"))
    loaded = load_questions(options.questions, None, options.num_questions, None, Splitter())
    chunks = sorted(loaded.chunks, key=lambda chunk: chunk.name)
    table = Table()
    for number, question in enumerate(loaded.questions, start=1):
        print(f"{time.strftime('%X')} {number} of {len(loaded.questions)}", file=sys.stderr, flush=True)
        context = around(chunks, question)
        asked = replace(question, chunks=tuple(context), history=())
        token_ids = study.prompt(asked.messages(loaded.system, study.separator))
        answer, full = study.full(token_ids)
        ways: dict[str, IsSeam] = {
            "by themselves": lambda *_: False,
            "after the part before": same_document,
            "after the chunk before": lambda *_: True,
        }
        for way, is_seam in ways.items():
            blender = blender_with_seams(study, context, is_seam)
            nothing = study.blended(token_ids, make_policy(BlendParams("none")), answer, blender)
            table.add(f"nothing, {way}", 0.0, full, nothing)
            for name, params in POLICIES.items():
                for share in SHARES:
                    policy = make_policy(replace(params, ratio=share))
                    table.add(f"{name}, {way}", share, full, study.blended(token_ids, policy, answer, blender))
    print(*table.lines(), sep="\n")
    study.model.close()


if __name__ == "__main__":
    main()
