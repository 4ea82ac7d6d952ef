"""Trains the town model from nothing: `python backend/training/train.py --name town`, and again to go on.

A step's data come from the seed and the step alone, so a resumed run is the same run. Uses a GPU with bfloat16 where
there is one, and on a CPU the type in which its units compute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from evaluate import evaluate
from model import ModelConfig, SmallLlama
from muon import Muon
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rows import KINDS, Batch, Batches, TextCoder
from tokenizer import EOS_ID, train_tokenizer
from torch.nn import functional
from transformers import PreTrainedTokenizerFast
from wired import wire

from kvarena.stack.machine import has_bf16_instructions
from settings import RUNS, STAGES, Settings

ACCURACY_DECAY = 0.95
MIN_STAGE_STEPS = 60
LOG_EVERY = 20
CHECKPOINT = "checkpoint.pt"
CORES_CHECKED_EVERY_S = 6.0


@dataclass
class Progress:
    """`stage_accuracy` is a moving average over the answers of the stage."""

    step: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0
    stage: int = 0
    stage_steps: int = 0
    stage_accuracy: float = 0.0
    evaluated_at: int = 0


class Training:
    """A run in `folder`. Its state is `model`, the optimizers and `progress`."""

    def __init__(self, folder: Path, settings: Settings, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        settings.save(folder)
        self.folder, self.settings, self.device = folder, settings, device
        self.tokenizer = load_tokenizer(folder)
        self.coder = TextCoder(self.tokenizer)
        torch.manual_seed(settings.seed)
        config = ModelConfig(
            len(self.tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
        )
        self.model = SmallLlama(config).to(device)
        wire(self.model, settings.seed)
        matrices = [param for name, param in self.model.named_parameters() if param.ndim == 2 and "embed" not in name]
        others = [param for name, param in self.model.named_parameters() if param.ndim != 2 or "embed" in name]
        self.others = others
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, settings.matrix_rate),
            torch.optim.Adam(others, settings.other_rate, betas=(0.9, 0.95), eps=1e-9),
        ]
        self.base_rates = (settings.matrix_rate, settings.other_rate)
        self.progress = self._load()
        self.autocast = _autocast(device)
        self.kind_weights = torch.tensor([0.0, *map(kind_weight, KINDS)], device=device)
        self.is_stopping = False
        self.free_cores: FreeCores | None = None

    def compile(self) -> None:
        """Fuses what lies between the matrix products; all layers share one compiled function per row shape."""
        torch._dynamo.config.recompile_limit = 32
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)

    def run(self, display: Display, num_steps: int | None = None, num_workers: int = 1) -> None:
        """Until the settings' end, a signal, or `num_steps` more steps; saves now and then and at the end."""
        settings, progress = self.settings, self.progress
        self._rewind_log()
        batches = Batches(self.folder / "tokenizer", settings.seed, num_workers)
        last_step = progress.step + num_steps if num_steps is not None else None
        clock, saved_at, tally = time.monotonic(), time.monotonic(), Tally()
        while (share := settings.share(progress.num_tokens, progress.elapsed_s)) < 1 and not self.is_stopping:
            if progress.step == last_step:
                break
            if self.free_cores:
                self.free_cores.adapt()
            self._advance_stage(share)
            batch = batches.get(progress.step, progress.stage).to(self.device)
            self._set_rates(settings.rate(progress.step, share))
            tally.add(self._step(batch), batch)
            progress.elapsed_s += (now := time.monotonic()) - clock
            clock = now
            if progress.step % LOG_EVERY == 0:
                self._log({"type": "train", "rate": settings.rate(progress.step, share)} | tally.take(), display)
            if progress.num_tokens - progress.evaluated_at >= settings.eval_every_tokens:
                self._evaluate(display)
            if now - saved_at > settings.save_every_s:
                self.save()
                saved_at = now
        batches.close()
        self.save()

    def save(self) -> None:
        """Replaces the checkpoint in one step: a run killed at any moment leaves a whole one."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        temporary = self.folder / f"{CHECKPOINT}.new"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / CHECKPOINT)

    def _load(self) -> Progress:
        """Restores model and optimizers where the folder has a checkpoint: the run goes on as if it hadn't stopped."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return Progress()
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return Progress(**state["progress"])

    def _step(self, batch: Batch) -> dict[str, Any]:
        stage, progress = STAGES[self.progress.stage], self.progress
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + progress.step)
        sampled = torch.rand(batch.labels.shape, generator=generator) < self.settings.context_targets_ratio
        used = (batch.labels > 0) | ((batch.labels == 0) & sampled.to(self.device))
        with self.autocast:
            logits = self.model.logits(self.model(batch.ids, batch.positions, batch.branch_mask)[used]).float()
        targets, labels = batch.targets[used], batch.labels[used]
        losses = functional.cross_entropy(logits, targets, reduction="none")
        is_answer = labels > 0
        weights = self.kind_weights[labels[is_answer]]
        answer_loss = (losses[is_answer] * weights).sum() / weights.sum()
        context_loss = losses[~is_answer].mean()
        (answer_loss + stage.context_weight * context_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        is_right = (logits.detach().argmax(-1) == targets)[is_answer]
        accuracy = float(is_right.float().mean())
        progress.stage_accuracy = ACCURACY_DECAY * progress.stage_accuracy + (1 - ACCURACY_DECAY) * accuracy
        progress.step += 1
        progress.stage_steps += 1
        progress.num_tokens += batch.num_tokens
        return {
            "answer_loss": answer_loss.item(),
            "context_loss": context_loss.item(),
            "is_right": is_right,
            "kinds": labels[is_answer] - 1,
            "targets": targets[is_answer],
        }

    def _advance_stage(self, share: float) -> None:
        progress = self.progress
        if progress.stage == len(STAGES) - 1:
            return
        stage = STAGES[progress.stage]
        is_learned = progress.stage_steps >= MIN_STAGE_STEPS and progress.stage_accuracy > stage.enough
        if share >= stage.until or is_learned:
            progress.stage += 1
            progress.stage_steps, progress.stage_accuracy = 0, 0.0

    def _set_rates(self, factor: float) -> None:
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor

    def _evaluate(self, display: Display) -> None:
        self.progress.evaluated_at = self.progress.num_tokens
        self._log({"type": "eval", "exact": evaluate(self.model, self.coder)}, display)

    def _rewind_log(self) -> None:
        """Drops what was logged after the checkpoint, by a run that was killed."""
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.progress.step))

    def _log(self, entry: dict[str, Any], display: Display) -> None:
        progress = self.progress
        where = {
            "step": progress.step,
            "num_tokens": progress.num_tokens,
            "elapsed_s": round(progress.elapsed_s, 1),
            "stage": STAGES[progress.stage].name,
            "share": round(self.settings.share(progress.num_tokens, progress.elapsed_s), 4),
        }
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(where | entry) + "\n")
        display.show(where | entry)


class Tally:
    """Sums over the steps between two lines of the log."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._losses: list[tuple[float, float]] = []
        self._right, self._asked = Counter[str](), Counter[str]()
        self._num_tokens, self._since = 0, time.monotonic()

    def add(self, result: dict[str, Any], batch: Batch) -> None:
        """Accuracy leaves out the end of the answer, which is easy."""
        self._losses.append((result["answer_loss"], result["context_loss"]))
        self._num_tokens += batch.num_tokens
        counts = result["targets"] != EOS_ID
        for index, kind in enumerate(KINDS):
            mask = (result["kinds"] == index) & counts
            if asked := int(mask.sum()):
                self._asked[kind] += asked
                self._right[kind] += int(result["is_right"][mask].sum())

    def take(self) -> dict[str, Any]:
        answer, context = (sum(column) / len(self._losses) for column in zip(*self._losses, strict=True))
        entry = {
            "answer_loss": round(answer, 4),
            "context_loss": round(context, 4),
            "tokens_per_s": round(self._num_tokens / (time.monotonic() - self._since)),
            "accuracy": {kind: round(self._right[kind] / asked, 3) for kind, asked in self._asked.items()},
        }
        self._clear()
        return entry


class Display:
    """Shows a run's progress: a bar and the last figures on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._console = Console()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=1.0, figures="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    def show(self, entry: dict[str, Any]) -> None:
        """An entry of the log."""
        if entry["type"] == "eval":
            for length, exact in entry["exact"].items():
                self._console.print(f"exact match at {length} tokens: {_figures(exact)}", soft_wrap=True)
            return
        figures = (
            f"{entry['num_tokens'] / 1e6:.2f}M tokens, {entry['tokens_per_s']}/s, "
            f"loss {entry['answer_loss']:.3f}, right: {_figures(entry['accuracy'])}"
        )
        if self._console.is_terminal:
            self._bar.update(self._task, completed=entry["share"], description=entry["stage"], figures=figures)
        else:
            self._console.print(f"{entry['elapsed_s']:7.0f} s  {entry['stage']:8} {figures}", soft_wrap=True)


def _figures(shares: dict[str, float]) -> str:
    return " ".join(f"{name} {100 * share:.0f}" for name, share in shares.items())


class FreeCores:
    """As many threads as cores are free: a thread that has to share its core makes all the others wait for it.

    Call `adapt` between steps; it looks at what other processes used since it looked last.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._num_cores = len(self._process.cpu_affinity())
        self._then, self._busy, self._own = self._now()

    def adapt(self) -> None:
        now, busy, own = self._now()
        if now - self._then < CORES_CHECKED_EVERY_S:
            return
        others = ((busy - self._busy) - (own - self._own)) / (now - self._then)
        self._then, self._busy, self._own = now, busy, own
        threads = max(1, min(self._num_cores, round(self._num_cores - others)))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        return time.monotonic(), times.user + times.nice + times.system, sum(self._process.cpu_times()[:2])


def kind_weight(kind: str) -> float:
    """Of a kind's answers in the loss: more for what is learned late."""
    if kind == "nickname":
        return 4.0
    return 2.0 if kind == "unanswerable" or kind.startswith("same_") else 1.0


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The run's own, trained when the run is new."""
    saved = folder / "tokenizer"
    if not saved.is_dir():
        train_tokenizer().save_pretrained(saved)
    return PreTrainedTokenizerFast.from_pretrained(saved)


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU and on CPUs that compute in it; elsewhere it would be emulated, and slower than float32."""
    has_bfloat16 = device.type == "cuda" or has_bf16_instructions()
    return torch.autocast(device.type, torch.bfloat16) if has_bfloat16 else nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="town", help="the run's folder below backend/training/runs")
    parser.add_argument("--tokens", type=int, help=f"length of the run (default {Settings.tokens:,})")
    parser.add_argument("--minutes", type=float, help="end after so much time of training, if that comes first")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--share", action="store_true", help="use only as many threads as other processes leave cores")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    arguments = parser.parse_args()
    folder = RUNS / arguments.name
    base = vars(Settings.load(folder)) if (folder / "settings.json").is_file() else {}
    given = {key: value for key in ("tokens", "minutes", "seed") if (value := getattr(arguments, key)) is not None}
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    training = Training(
        folder, Settings(**(base | given)), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    if not arguments.no_compile:
        training.compile()

    if arguments.share:
        training.free_cores = FreeCores()

    def stop(*_: object) -> None:
        training.is_stopping = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    with Display() as display:
        training.run(display)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
