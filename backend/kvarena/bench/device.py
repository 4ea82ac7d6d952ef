"""`kvarena bench device`: what blending gains on one device, in one process, without servers.

First it checks, for two model families, that a blend at ratio 1 gives the logits of full prefill. Then it measures the
time to the first token's logits over known chunks, in a new order each time, beside full prefill with PyTorch's own
choice of attention and with its flash kernels. Each time has its floor beside it: the FLOPs of what is computed, at the
rate of a large matrix product here, and the bytes of KV that are moved, at the rate of a copy from main memory.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvarena.bench.console import Column, table_of
from kvarena.bench.prompts import ContextOfChunks, Vocabulary, chunk_sizes
from kvarena.bench.results import Row, ratio_spread, spread
from kvarena.bench.shapes import write_shape
from kvarena.bench.variants import Variant, reads_scores
from kvarena.contenders.servers import GIB
from kvarena.engines.hf import attention
from kvarena.engines.hf.blend import HFBlender
from kvarena.engines.hf.model import HFModel
from kvarena.panels.panel import variant_label
from kvarena.policies.params import POLICIES, BlendParams
from kvarena.stores.memory import MemoryStore

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
}
FULL, FLASH = "full prefill", "full prefill, flash attention"
SEPARATOR = " # # "
CHECKED_TOKENS = 1000
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Of logits, in the norm: what rounding does to them."""


@dataclass(frozen=True)
class DeviceWorkload:
    """`num_repeats` prompts of `context_tokens` in chunks and a question, for each variant of the blend."""

    shapes: tuple[str, ...] = ("1b", "8b")
    context_tokens: tuple[int, ...] = (4000, 8000, 16_000)
    variants: tuple[Variant, ...] = (Variant("blend", "none"),)
    chunk_tokens: int = 512
    question_tokens: int = 24
    num_repeats: int = 5
    dtype: str = "bfloat16"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"--dtype is {self.dtype!r}; it takes one of PyTorch's, such as bfloat16")
        if self.num_repeats < 1 or not self.context_tokens or min(self.context_tokens) < self.chunk_tokens:
            raise ValueError("a run needs a repetition, and contexts of a chunk or more")

    @property
    def num_steps(self) -> int:
        per_length = self.num_repeats * (len(self.variants) + 2)
        return len(FAMILIES) + len(self.shapes) * len(self.context_tokens) * per_length


def default_policies() -> list[str]:
    """Every policy that chooses, at 5 and 15 %, and none that does."""
    choosing = [name for name in POLICIES if BlendParams(name).goes_by_ratio]
    return ["none", *(f"{name}:{ratio}" for name in choosing for ratio in (0.05, 0.15))]


def settings(workload: DeviceWorkload) -> dict[str, Any]:
    is_cuda = workload.device != "cpu" and torch.cuda.is_available()
    policies = [variant.choices for variant in workload.variants]
    name = torch.cuda.get_device_name() if is_cuda else "CPU"
    own = {key: value for key, value in vars(workload).items() if key != "variants"}
    return {"benchmark": "device", **own, "policies": policies, "device_name": name}


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """What was checked, and a table with a section for each shape and length."""
    for row in rows:
        if "check" in row:
            same = "the same likeliest token" if row["is_same_token"] else "another likeliest token"
            console.print(f"{row['family']}: logits at ratio 1 are off by {row['difference']:.1e}, {same}")
    measured = [row for row in rows if "check" not in row]
    figures: dict[str, Column] = {
        "ms": "{ttft_ms[median]:,.1f}",
        "floor ms": "{floor_ms:,.1f}",
        "speedup": "{speedup_vs_full[median]:.2f}",
        "reused": "{num_reused_tokens:,}",
        "recomputed": "{num_recomputed_tokens:,}",
        "peak GiB": lambda row: "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}",
    }
    hidden = dict.fromkeys(("ttft_ms", "floor_ms", "speedup_vs_full", "num_reused_tokens", "num_recomputed_tokens"))
    shown = [row | hidden if row["failure"] else row for row in measured]
    title = "Time to the first token; medians"
    console.print(table_of(title, shown, {"": variant_label}, figures, section=_cell, min_width=14))
    for row in measured:
        if row["failure"]:
            console.print(f"{_cell(row)}, {variant_label(row)}: {row['failure']}", markup=False)


def _cell(row: Row) -> str:
    return f"{row['shape']}, {row['context_tokens']:,} tokens"


def run(workload: DeviceWorkload, folder: Path, tokenizer_from: Path, on_step: Callable[[], None]) -> Iterator[Row]:
    """Rows as they are measured; models of random weights are written to `folder`.

    Raises `ValueError` where ratio 1 doesn't give the logits of full prefill.
    """
    for family, changes in FAMILIES.items():
        with _Device(workload, write_shape(workload.shapes[0], folder / family, tokenizer_from, changes)) as device:
            yield {"check": "ratio 1", "family": family, **device.check()}
        on_step()
    for shape in workload.shapes:
        with _Device(workload, write_shape(shape, folder / shape, tokenizer_from)) as device:
            for context_tokens in workload.context_tokens:
                for row in device.measure(context_tokens, on_step):
                    yield {"shape": shape, **row}


@dataclass(frozen=True)
class _Asked:
    """Milliseconds until the first token is known, a blend's report, and the peak of the device's memory."""

    ms: float
    report: Any
    peak_bytes: int | None


class _Device:
    """One model on the device, with a blender whose store has room for all chunks."""

    def __init__(self, workload: DeviceWorkload, path: Path) -> None:
        self._workload = workload
        self._model = HFModel.load(str(path), workload.device, workload.dtype, random=True)
        self._store = MemoryStore(1 << 40)
        self._blender = HFBlender(self._model, self._store, separator=SEPARATOR)
        self._vocabulary = Vocabulary.of(self._model.tokenizer.backend_tokenizer, SEPARATOR)
        self._rng = random.Random(workload.seed)
        self._context = ContextOfChunks(self._vocabulary, workload.question_tokens, self._rng)

    def __enter__(self) -> _Device:
        return self

    def __exit__(self, *_: object) -> None:
        """Frees the memory: the next model is loaded while this object still exists."""
        is_cuda = self._is_cuda
        self._model.close()
        del self._model, self._blender, self._store
        gc.collect()
        if is_cuda:
            torch.cuda.empty_cache()

    def check(self) -> Row:
        chunks = self._known_chunks(CHECKED_TOKENS)
        prompt = self._context.prompt(self._rng.sample(chunks, len(chunks)))
        blended = self._blender.prefill(prompt, BlendParams("all"), len(prompt))
        full = self._model.without_kv(prompt).float()
        if not blended.report.num_recomputed_tokens:
            raise ValueError("nothing was there to be recomputed: the check says nothing")
        difference = float((blended.logits.float() - full).norm() / full.norm())
        if not difference <= (limit := MAX_DIFFERENCE[getattr(torch, self._workload.dtype)]):
            raise ValueError(f"at ratio 1 logits differ from full prefill's by {difference:.1e}, more than {limit:g}")
        return {
            "difference": difference,
            "is_same_token": bool(blended.logits.argmax() == full.argmax()),
            "num_recomputed_tokens": blended.report.num_recomputed_tokens,
        }

    def measure(self, context_tokens: int, on_step: Callable[[], None]) -> Iterator[Row]:
        """In every round all are asked the same prompt; the first round isn't counted."""
        chunks = self._known_chunks(context_tokens)
        ways: dict[str | Variant, Callable[[list[int]], Any]] = {
            FULL: lambda prompt: self._full(prompt, None),
            FLASH: lambda prompt: self._full(prompt, SDPBackend.FLASH_ATTENTION),
        }
        ways |= {variant: partial(self._blend, variant) for variant in self._workload.variants}
        found: dict[str | Variant, list[_Asked]] = {way: [] for way in ways}
        failures: dict[str | Variant, str] = {}
        for repeat in range(self._workload.num_repeats + 1):
            prompt = self._context.prompt(self._rng.sample(chunks, len(chunks)))
            for way, ask in ways.items():
                if way not in failures:
                    try:
                        found[way].append(self._timed(ask, prompt))
                    except RuntimeError as error:  # no such kernel here, or no memory
                        failures[way] = str(error).splitlines()[0]
                if repeat:
                    on_step()
        rates = _Rates.of(self._model.kv_shape.device, getattr(torch, self._workload.dtype))
        full_ms = [asked.ms for asked in found[FULL][1:]]
        for way, answers in found.items():
            variant = way if isinstance(way, Variant) else Variant(way)
            last = answers[-1] if answers else None
            report = last and last.report
            num_reused = report.num_reused_tokens if report else 0
            times_ms = [asked.ms for asked in answers[1:]]
            yield {
                **variant.to_json(),
                "context_tokens": context_tokens,
                "num_prompt_tokens": len(prompt),
                "num_reused_tokens": num_reused,
                "num_recomputed_tokens": report.num_recomputed_tokens if report else 0,
                "ttft_ms": spread(times_ms),
                "speedup_vs_full": ratio_spread([full / own for full, own in zip(full_ms, times_ms, strict=False)]),
                "floor_ms": self._floor_ms(len(prompt), num_reused, rates),
                "peak_bytes": last and last.peak_bytes,
                "failure": failures.get(way) or (report and report.blend_failures and "the blend failed") or None,
                "stages_ms": _stages(report) if report else None,
            }

    def _known_chunks(self, context_tokens: int) -> list[list[int]]:
        """Stored, with scores where a policy reads them."""
        self._store.clear()
        chunks = [self._context.chunk(size) for size in chunk_sizes(context_tokens, self._workload.chunk_tokens)]
        while self._blender.prefill(self._context.prompt(chunks), BlendParams("none"), 1).report.store_misses:
            """The last ones are on their way to the store."""
        if any(reads_scores(one.policy) for one in self._workload.variants):
            for start in range(0, max(1, len(chunks) - 1), 2):
                self._blender.score(self._context.prompt(chunks[start : start + 4]))
        return chunks

    def _blend(self, variant: Variant, prompt: list[int]) -> Any:
        params = BlendParams(**variant.choices)
        blended = self._blender.prefill(prompt, params, len(prompt))
        return blended.logits, blended.report

    def _full(self, prompt: list[int], backend: SDPBackend | None) -> Any:
        """Transformers' own forward and cache, with PyTorch's attention."""
        ids = torch.tensor([prompt], device=self._model.kv_shape.device)

        def forward() -> torch.Tensor:
            self._model.module.set_attn_implementation("sdpa")
            try:
                with sdpa_kernel(backend) if backend else nullcontext():
                    logits: torch.Tensor = self._model.module(ids, use_cache=True, logits_to_keep=1).logits[0, -1]
                    return logits
            finally:
                self._model.module.set_attn_implementation(attention.NAME)

        return self._model.run(forward), None

    def _timed(self, ask: Callable[[list[int]], Any], prompt: list[int]) -> _Asked:
        """By the host's clock, with the device's work ended on both sides: what launching takes counts, too."""
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start_s = perf_counter()
        logits, report = ask(prompt)
        int(logits.argmax())  # waits for the device
        ms = 1000 * (perf_counter() - start_s)
        return _Asked(ms, report, torch.cuda.max_memory_allocated() if self._is_cuda else None)

    def _floor_ms(self, num_tokens: int, num_reused: int, rates: _Rates) -> float:
        """Two FLOPs for each weight and token; in attention four for each head dimension and pair of tokens."""
        config, shape = self._model.module.config, self._model.kv_shape
        weights = sum(p.numel() for name, p in self._model.module.named_parameters() if "embed_tokens" not in name)
        num_computed = num_tokens - num_reused
        pairs = num_computed * (num_tokens - num_computed / 2)
        flops: float = 2 * weights * num_computed
        flops += 4 * config.num_attention_heads * shape.head_size * shape.num_layers * pairs
        kv_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * shape.dtype.itemsize * num_reused
        return round(1000 * (flops / rates.flops_per_s + kv_bytes / rates.bytes_per_s), 3)

    @property
    def _is_cuda(self) -> bool:
        return bool(self._model.kv_shape.device.type == "cuda")


@dataclass(frozen=True)
class _Rates:
    flops_per_s: float
    bytes_per_s: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> _Rates:
        size = 8192 if device.type == "cuda" else 1024
        one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        here = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=device.type == "cuda")
        there = torch.empty_like(here, device=device)
        return cls(
            2 * size**3 / _median_s(lambda: one @ other, device),
            len(here) / _median_s(lambda: there.copy_(here, non_blocking=True), device),
        )


def _median_s(work: Callable[[], object], device: torch.device, num: int = 5) -> float:
    def once() -> float:
        start_s = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start_s

    return statistics.median([once() for _ in range(num + 1)][1:])


def _stages(report: Any) -> dict[str, float]:
    names: Sequence[str] = ("fetch_ms", "move_ms", "write_ms", "select_ms", "recompute_ms")
    return {name.removesuffix("_ms"): round(getattr(report, name), 3) for name in names}
