"""Attention of chosen tokens by our kernel and by vLLM's, over the same paged cache, in turns: GFLOP/s of each.

    OMP_NUM_THREADS=2 .venv/bin/python examples/research/kernel_benchmark.py --dtype bfloat16

The FLOPs are those of the causal attention of the chosen tokens, 4 D for each pair of a query head and a token that it
sees. vLLM gets each token as a row by itself, as its batches are (`kvarena.engines.vllm.model`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import torch
from vllm import _custom_ops as vllm_ops

from kvarena.engines.vllm.attention import ChosenTokens, CPUKernels, library

HEADS = {"180M": (16, 4, 64), "SmolLM2-135M": (9, 3, 64), "Llama-3.1-8B": (32, 8, 128)}
BLOCK_SIZE = 128
ROUNDS = 9


def seconds(functions: list[Callable[[], None]]) -> list[float]:
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, own in zip(functions, taken, strict=True):
            start_s = time.perf_counter()
            function()
            own.append(time.perf_counter() - start_s)
    return [median(own) for own in taken]


def compare(name: str, num_tokens: int, share: float, dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_size = HEADS[name]
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    cache = torch.randn(num_blocks, num_kv_heads, BLOCK_SIZE, 2 * head_size).to(dtype)
    keys, values = cache.view(num_blocks, num_kv_heads, 2 * BLOCK_SIZE, head_size).chunk(2, dim=2)
    table = torch.arange(num_blocks, dtype=torch.int32)
    positions = torch.randperm(num_tokens)[: round(share * num_tokens)].sort().values
    queries = torch.randn(len(positions), num_heads, head_size).to(dtype)
    output = torch.empty_like(queries)
    found = library()
    assert found is not None, "no kernels here"
    kernels = CPUKernels([SimpleNamespace(kv_cache=cache, head_size=head_size)], found)
    ends, starts = (positions + 1).int(), torch.arange(len(positions) + 1, dtype=torch.int32)
    tables = table.repeat(len(positions), 1)
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        len(positions), num_heads, num_kv_heads, head_size, ends, dtype, starts, True, -1, "vec", True
    )

    def ours() -> None:
        kernels.attend(queries, cache, ChosenTokens(positions, table), head_size**-0.5, output)

    def of_vllm() -> None:
        vllm_ops.cpu_attention_with_kv_cache(
            queries, keys, values, output, starts, ends, head_size**-0.5, True, None, -1, tables, 0.0, metadata, None
        )

    flops = 4 * head_size * num_heads * int((positions + 1).sum())
    own, theirs = (flops / taken / 1e9 for taken in seconds([ours, of_vllm]))
    print(
        f"{name:14} {num_tokens:6} tokens, {share:4.0%}: ours {own:5.0f}, vLLM {theirs:5.0f}, ratio {own / theirs:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    dtype = getattr(torch, parser.parse_args().dtype)
    for name in HEADS:
        for num_tokens, share in ((1_000, 0.05), (4_000, 0.05), (4_000, 0.15), (16_000, 0.05), (16_000, 0.15)):
            compare(name, num_tokens, share, dtype)


if __name__ == "__main__":
    main()
