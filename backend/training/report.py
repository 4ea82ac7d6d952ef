"""How good a run's model is: `python backend/training/report.py --name town`.

Exact match by kind and context length with full attention, and with naive reuse of chunks.
"""

from __future__ import annotations

import argparse
import json

import torch
from evaluate import evaluate
from rich.console import Console
from rich.table import Table
from train import Training

from settings import RUNS, Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="town")
    parser.add_argument("--times", type=int, default=2, help="so many times as many towns as during training")
    parser.add_argument("--short", action="store_true", help="without contexts of 2,000 tokens and more")
    arguments = parser.parse_args()
    run = RUNS / arguments.name
    training = Training(run, Settings.load(run), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    results = {
        prefill: evaluate(training.model, training.coder, prefill == "naive", not arguments.short, arguments.times)
        for prefill in ("full", "naive")
    }
    (run / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    kinds = list(next(iter(results["full"].values())))
    table = Table("context", "prefill", *kinds)
    for length in results["full"]:
        for prefill, by_length in results.items():
            exact = by_length[length]
            table.add_row(length, prefill, *(f"{100 * exact[kind]:.1f}" if kind in exact else "-" for kind in kinds))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
