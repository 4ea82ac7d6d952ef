"""Draws a run's learning curve from its log: `python backend/training/plot.py --name town`."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from settings import RUNS

CONTEXT = "800"
KINDS = ("single", "across", "same_person", "same_shop", "same_street", "same_day", "nickname", "followup")


def draw(entries: list[dict[str, Any]]) -> Figure:
    """Loss above, exact match on unseen towns below, over the tokens seen."""
    train = [entry for entry in entries if entry["type"] == "train"]
    evals = [entry for entry in entries if entry["type"] == "eval"]
    figure, (loss, exact) = plt.subplots(2, 1, figsize=(8, 8), sharex=True, layout="constrained")
    millions = [entry["num_tokens"] / 1e6 for entry in train]
    loss.plot(millions, [entry["answer_loss"] for entry in train], label="answers")
    loss.plot(millions, [entry["context_loss"] for entry in train], label="context", alpha=0.5)
    loss.set(ylabel="loss (nats per token)", ylim=(0, 4))
    for kind in KINDS:
        asked = [entry for entry in evals if kind in entry["exact"][CONTEXT]]
        points = [(entry["num_tokens"] / 1e6, 100 * entry["exact"][CONTEXT][kind]) for entry in asked]
        exact.plot(*zip(*points, strict=True) if points else ((), ()), label=kind, marker=".")
    exact.set(xlabel="million tokens", ylabel=f"exact match (%), {CONTEXT} tokens of notes", ylim=(0, 101))
    for before, entry in itertools.pairwise(train):
        if before["stage"] != entry["stage"]:
            for axes in (loss, exact):
                axes.axvline(entry["num_tokens"] / 1e6, color="grey", linewidth=0.5)
            loss.annotate(entry["stage"], (entry["num_tokens"] / 1e6, 3.8), fontsize="small")
    for axes in (loss, exact):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    return figure


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="town")
    parser.add_argument("--output", type=Path, help="a .png or .svg file (default: curve.png in the run's folder)")
    arguments = parser.parse_args()
    run = RUNS / arguments.name
    output = arguments.output or run / "curve.png"
    draw(read_log(run / "log.jsonl")).savefig(output, dpi=120)
    print(output)


if __name__ == "__main__":
    main()
