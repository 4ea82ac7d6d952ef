"""What became of the search for a similar earlier prompt: from the contender's report to HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class SimilarTask:
    """`similarity` is the cosine to the earlier prompt that lent its KV; None: none was similar enough, or none asked.
    `similarity_threshold` None: the server finds none good enough at present. `checked_similarity` is there when reuse
    was only compared with full prefill, to find the threshold; `check_agrees`: it gave the same first token.

    A layer pass is one prompt token through one layer. `matched_prompt` is empty where the server keeps it to itself.
    """

    mode: str
    similarity_threshold: float | None
    similarity: float | None
    num_layer_passes: int
    num_layer_passes_without_reuse: int
    matched_prompt: str = ""
    num_matched_prompt_tokens: int | None = None
    checked_similarity: float | None = None
    check_agrees: bool = False

    @classmethod
    def read(cls, report: Mapping[str, Any]) -> SimilarTask:
        check = report.get("check") or {}
        return cls(
            mode=report["mode"],
            similarity_threshold=report["similarity_threshold"],
            similarity=report["similarity"],
            num_layer_passes=report["num_layer_passes"],
            num_layer_passes_without_reuse=report["num_layer_passes_without_reuse"],
            matched_prompt=report.get("matched_prompt") or "",
            num_matched_prompt_tokens=report.get("num_matched_prompt_tokens"),
            checked_similarity=check.get("similarity"),
            check_agrees=check.get("agrees", False),
        )

    @property
    def num_skipped_passes(self) -> int:
        """Negative where choosing what to recompute cost more than was reused."""
        return self.num_layer_passes_without_reuse - self.num_layer_passes


def similar_task_html(task: SimilarTask) -> str:
    if task.similarity is None:
        return (
            f'<div class="ka-task" data-testid="similar-task" data-hit="false">{_miss(task)} Prefilled in full.</div>'
        )
    return (
        '<div class="ka-task" data-testid="similar-task" data-hit="true">'
        f"Similar to an earlier prompt: cosine {_number('similarity', task.similarity, f'{task.similarity:.5f}')}, "
        f"threshold {_shown(task.similarity_threshold)}. {_skipped(task)}{_earlier_prompt(task)}</div>"
    )


def _miss(task: SimilarTask) -> str:
    if task.checked_similarity is not None:
        first_token = "would have begun as full prefill did" if task.check_agrees else "would have begun differently"
        return f"Compared, to find the threshold: reuse at cosine {task.checked_similarity:.5f} {first_token}."
    if task.similarity_threshold is None:
        return "No reuse: the server finds no similarity at which answers agree with full prefill often enough."
    threshold = _shown(task.similarity_threshold)
    return f"No similar earlier prompt: none that can be used has a cosine of {threshold} or more."


def _shown(threshold: float | None) -> str:
    return "none" if threshold is None else f"{threshold:g}"


def _skipped(task: SimilarTask) -> str:
    skipped, total = task.num_skipped_passes, task.num_layer_passes_without_reuse
    number = _number("num_skipped_passes", skipped, f"{abs(skipped):,}")
    if skipped < 0:
        return f"Skipped nothing: ran {number} layer passes more than the {total:,} of a full prefill."
    return f"Skipped {number} of {total:,} layer passes ({skipped / total:.0%})."


def _earlier_prompt(task: SimilarTask) -> str:
    if not task.matched_prompt:
        return ""
    size = "" if task.num_matched_prompt_tokens is None else f", {task.num_matched_prompt_tokens:,} tokens"
    return (
        f"<details><summary>The earlier prompt{size}</summary>"
        f'<div class="ka-text" data-testid="matched-prompt">{escape(task.matched_prompt)}</div></details>'
    )


def _number(key: str, value: float, text: str) -> str:
    return f'<b data-figure="{key}" data-value="{value!r}">{text}</b>'
