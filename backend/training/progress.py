"""Shows a run's progress: a bar and the last figures on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Display:
    def __init__(self) -> None:
        self._console = Console()
        self._bar = Progress(
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
