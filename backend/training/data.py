"""Batches made ahead in worker processes. What a step gets depends on the seed, the step and the stage alone."""

from __future__ import annotations

import random
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from curriculum import STAGES
from rows import Batch, TextCoder, make_batch
from transformers import PreTrainedTokenizerFast

_coder: TextCoder | None = None


class Batches:
    """`num_workers` processes, each two batches ahead; with 0, batches are made where they are asked for."""

    def __init__(self, tokenizer_folder: Path, seed: int, num_workers: int) -> None:
        self._seed, self._ahead = seed, 2 * num_workers
        self._tokenizer_folder = tokenizer_folder
        self._pool = (
            ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (tokenizer_folder,))
            if num_workers
            else None
        )
        self._made: dict[tuple[int, int], Future[Batch]] = {}

    def get(self, step: int, stage: int) -> Batch:
        if self._pool is None:
            if _coder is None:
                _load_coder(self._tokenizer_folder)
            return _make(self._seed, step, stage)
        for ahead in range(step, step + self._ahead + 1):
            if (ahead, stage) not in self._made:
                self._made[ahead, stage] = self._pool.submit(_make, self._seed, ahead, stage)
        batch = self._made[step, stage].result()
        self._made = {key: future for key, future in self._made.items() if key[0] > step}
        return batch

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(tokenizer_folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _load_coder(tokenizer_folder)


def _load_coder(tokenizer_folder: Path) -> None:
    global _coder
    _coder = TextCoder(PreTrainedTokenizerFast.from_pretrained(tokenizer_folder))


def _make(seed: int, step: int, stage: int) -> Batch:
    assert _coder is not None
    rng = random.Random(f"{seed} {step}")
    return make_batch(_coder, STAGES[stage].pick_shape(rng), STAGES[stage].mix, rng)
