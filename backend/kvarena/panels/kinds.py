"""The kinds of result files: what is drawn of each, and how two of one kind are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvarena.panels.panel import Colours, Panel, Result, colours_in
from kvarena.panels.quality import calibrate_panels, eval_panels, simllm_panels
from kvarena.panels.speed import (
    ai100_panels,
    all_ttft_panels,
    decode_panels,
    device_panels,
    prefix_panels,
    soak_panels,
    sustained_panels,
    tasks_panels,
)


@dataclass(frozen=True)
class Picture:
    """How the panels are laid out in the image that is saved beside a result file."""

    width_in: float
    num_columns: int = 1
    width_ratios: Sequence[float] = ()


@dataclass(frozen=True)
class ResultKind:
    """What is to be known of a kind of result file, wherever it is drawn.

    `keys` tell its rows apart, and `time` is what two files are compared by; none of `eval`, which is compared question
    by question. `picture`: of those that have one beside the file.
    """

    panels: Callable[[Result, Colours], list[Panel]]
    keys: tuple[str, ...] = ()
    time: str = "ttft_ms"
    picture: Picture | None = None


TTFT, EVAL = "ttft", "eval"
VARIANT = ("contender", "policy", "ratio", "check_layer", "max_ttft_ms", "options")
RESULT_KINDS: dict[str, ResultKind] = {
    TTFT: ResultKind(all_ttft_panels, (*VARIANT, "context_tokens", "store", "prompts", "concurrency")),
    EVAL: ResultKind(eval_panels, picture=Picture(11, 2)),
    "calibrate": ResultKind(calibrate_panels, (*VARIANT, "sink_tokens")),
    "device": ResultKind(device_panels, ("shape", *VARIANT, "context_tokens")),
    "sustained": ResultKind(sustained_panels, (*VARIANT, "first_request")),
    "soak": ResultKind(soak_panels, ("contender",)),
    "decode": ResultKind(decode_panels, ("contender", "context_tokens"), "tpot_ms"),
    "prefix": ResultKind(prefix_panels, ("level", "scenario", "context_tokens"), picture=Picture(8)),
    "ai100": ResultKind(ai100_panels, ("measure", "turn"), "slots_ttft_ms", Picture(9, 2, (2, 1))),
    "simllm": ResultKind(simllm_panels, ("model", "mode", "similarity_threshold"), picture=Picture(11, 2)),
    "tasks": ResultKind(tasks_panels, ("num_tasks", "embedding_dim"), "lookup_ms"),
}
"""By `settings.benchmark`: every kind of file that the project writes."""


def panels_of(result: Result, colours: Colours | None = None) -> list[Panel]:
    """`colours`: those of the names of all files that are shown together. Raises `ValueError` for a file that isn't
    what it says, naming what is odd.
    """
    settings = result.get("settings") or {}
    benchmark = str(settings.get("benchmark", ""))
    if benchmark not in RESULT_KINDS:
        raise ValueError(f"the benchmark {benchmark!r} is none of {', '.join(RESULT_KINDS)}")
    try:
        return RESULT_KINDS[benchmark].panels(result, colours or colours_in([result])) if result["rows"] else []
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"other rows than the benchmark {benchmark} writes: {reason}") from error


def result_summary(result: Result) -> str:
    """Which benchmark, of what, where; such as `eval · town · Xeon · 2 cores`."""
    settings, machine = result.get("settings") or {}, result.get("machine") or {}
    cores = machine.get("num_cores")
    model = settings.get("shape") or settings.get("model")
    parts = (settings.get("benchmark"), model, machine.get("cpu"), f"{cores} cores" if cores else None)
    return " · ".join(str(part) for part in parts if part)
