"""Result files, and the statistics in their rows.

A file is JSON: `rows` with settings, versions and machine beside them. Rows are flat objects but for groups of figures
(`{"median": .., "p95": ..}`), which keep their unit in the name.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from kvarena.home import project_root
from kvarena.panels.panel import Row as Row
from kvarena.stack.machine import cpu_name, versions

DIGITS = 4
"""Of a share in a row."""


def check_writable(path: Path) -> None:
    """Called before hours of measuring. Raises `OSError` or `ValueError` where `save_results` couldn't write."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file for the results")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    part.touch()
    part.unlink()


def save_results(path: Path, settings: Mapping[str, Any], rows: Sequence[Row], **details: Any) -> None:
    """Makes the folders too. `details` go beside the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"settings": dict(settings), "versions": versions(), "machine": machine(), "rows": list(rows), **details}
    write_whole(path, json.dumps(result, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The whole file or nothing."""
    part = _part_of(path)
    part.write_text(text)
    part.replace(path)


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def load_results(path: Path) -> dict[str, Any]:
    """Raises `ValueError` with the path for a file that isn't a result."""
    try:
        result = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} can't be read as a result file: {error}") from error
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise ValueError(f"{path} has no list of rows")
    return result


def shown_path(path: Path) -> str:
    """Relative to the project's folder where it is inside: result files go to other machines."""
    path, root = path.resolve(), project_root()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def machine() -> dict[str, Any]:
    """What the figures depend on. Cores are those this process may use."""
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if gpus := _gpu_names():
        found["gpus"] = gpus
    return found


def _gpu_names() -> list[str]:
    """Those that torch sees; none where it isn't installed and only servers are measured."""
    if find_spec("torch") is None:
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and 95th percentile; None without values."""
    if not values:
        return None
    return {"median": round(float(np.median(values)), 3), "p95": round(float(np.percentile(values, 95)), 3)}


def ratio_spread(ratios: Sequence[float]) -> dict[str, float] | None:
    """Median, minimum and maximum of ratios taken pair by pair; None without any."""
    if not ratios:
        return None
    return {
        "median": round(float(np.median(ratios)), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
    }


CONFIDENCE = 0.95


def median_interval(values: Sequence[float]) -> dict[str, float] | None:
    """The 95 % confidence interval of the median, for any distribution: the order statistics that the binomial
    distribution gives. None for fewer than six values.
    """
    ordered, tail, place = sorted(values), 0.0, 0
    while place < len(ordered):
        tail += math.comb(len(ordered), place) / 2 ** len(ordered)
        if 2 * tail > 1 - CONFIDENCE:
            break
        place += 1
    return {"low": round(ordered[place - 1], 3), "high": round(ordered[-place], 3)} if place else None


NUM_RESAMPLES = 2_000


def mean_interval(values: Sequence[float], seed: int = 0, *, is_share: bool = False) -> dict[str, float] | None:
    """Mean and 95 % bootstrap interval (percentile method); None without values.

    Where all values are equal the interval has no width, except for a share of none or all, which gets Wilson's:
    resampling can't show what few questions leave open.
    """
    from scipy.stats import binomtest, bootstrap

    if not values:
        return None
    mean = low = high = float(np.mean(values))
    if len(set(values)) > 1:
        resampled = bootstrap(
            (np.asarray(values, dtype=float),),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        low, high = map(float, resampled.confidence_interval)
    elif is_share and mean in (0, 1):
        low, high = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    return {"mean": round(mean, DIGITS), "low": round(low, DIGITS), "high": round(high, DIGITS)}
