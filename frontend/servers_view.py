"""The drawer that shows the servers: what each does, its memory and store, and its log's lines on one request; and the
LMCache server behind them.

Data and HTML only; `chat_session.py` asks the servers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

_METRICS = {
    "num_running": "vllm:num_requests_running",
    "num_waiting": "vllm:num_requests_waiting",
    "kv_cache_ratio": "vllm:kv_cache_usage_perc",
    "memory_bytes": "kvarena_server_memory_bytes",
    "main_process_bytes": "process_resident_memory_bytes",
    "store_bytes": "kvarena_store_bytes",
    "store_entries": "kvarena_store_entries",
    "store_hits": 'kvarena_store_lookups_total{outcome="hits"}',
    "store_misses": 'kvarena_store_lookups_total{outcome="misses"}',
}
_SAMPLE = re.compile(r"^([a-zA-Z_:]+)(?:\{(.*)\})? ([-+.\deE]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Watched:
    """`metrics` has what is shown of `/metrics`, under the names of `_METRICS`, as far as the server has it. `state` is
    in words; `about_lines` says why a server never has lines.
    """

    log_lines: tuple[str, ...]
    metrics: Mapping[str, float]
    state: str = ""
    about_lines: str = ""


def read_metrics(text: str) -> dict[str, float]:
    """From Prometheus' text format, summed over engines and models."""
    sums: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        outcome = re.search(r'outcome="\w+"', labels)
        key = f"{name}{{{outcome.group()}}}" if outcome else name
        sums[key] = sums.get(key, 0.0) + float(value)
    return {shown: sums[key] for shown, key in _METRICS.items() if key in sums}


def lmcache_watched(memory: Mapping[str, Any], metrics: Mapping[str, float]) -> Watched:
    """From what an LMCache server says of its memory."""
    store = {
        "store_entries": memory["total_object_count"],
        "store_bytes": memory["memory_used_bytes"],
        "store_max_bytes": memory["memory_total_bytes"],
    }
    state = "healthy" if memory["is_healthy"] else "not healthy"
    return Watched((), {**metrics, **store}, state, LMCACHE_HAS_NO_LINES)


LMCACHE_HAS_NO_LINES = (
    "It isn't told whose request it serves: what it did for this one is in the lines of those that ask it."
)


def server_html(name: str, title: str, watched: Watched | None, problem: str, wanted: str = "") -> str:
    """`problem` replaces what couldn't be asked. A log line shows the figures that have `wanted` in their name or
    value.
    """
    state = escape(problem if watched is None else _state(watched))
    lines = "".join(_line_html(line, wanted) for line in watched.log_lines) if watched else ""
    about = (watched.about_lines or "No log line of this request yet.") if watched and not lines else ""
    empty = f'<div class="ka-notice">{escape(about)}</div>' if about else ""
    return (
        f'<div class="ka-watched" data-testid="watched-{escape(name)}" data-state="{"up" if watched else "down"}">'
        f"<b>{escape(title)}</b><small>{state}</small>{lines}{empty}</div>"
    )


def _state(watched: Watched) -> str:
    metrics = watched.metrics
    told = [watched.state] if watched.state else []
    if "num_running" in metrics:
        told.append(f"{metrics['num_running']:.0f} running, {metrics.get('num_waiting', 0):.0f} waiting")
    if "kv_cache_ratio" in metrics:
        told.append(f"{metrics['kv_cache_ratio']:.0%} of the KV cache in use")
    if "memory_bytes" in metrics:
        told.append(f"{_size(metrics['memory_bytes'])} of memory")
    elif "main_process_bytes" in metrics:
        told.append(f"{_size(metrics['main_process_bytes'])} of memory in its main process")
    if "store_bytes" in metrics:
        room = f" of {_size(metrics['store_max_bytes'])}" if "store_max_bytes" in metrics else ""
        told.append(f"store: {metrics.get('store_entries', 0):,.0f} entries, {_size(metrics['store_bytes'])}{room}")
    if "store_hits" in metrics:
        told.append(f"looked up: {metrics['store_hits']:,.0f} found, {metrics.get('store_misses', 0):,.0f} not")
    return " · ".join(told)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.1f} MiB"


def _line_html(line: str, wanted: str) -> str:
    """The line's figures, with those of its details."""
    fields = json.loads(line)
    shown = {key: _shown(value) for key, value in (fields | (fields.pop("details", None) or {})).items()}
    cells = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
        for key, value in shown.items()
        if wanted.lower() in f"{key} {value}".lower()
    )
    if not cells:
        return '<div class="ka-notice" data-testid="log-line">Nothing in this line matches.</div>'
    return f'<dl class="ka-log ka-text" data-testid="log-line">{cells}</dl>'


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
