"""The dashboard's queries, and what they need of the servers' `/metrics`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

FOLDER = Path(__file__).resolve().parents[2] / "observability"
SCRAPED = {"contender", "le"}
"""Labels that are no matter of a server: the one of `targets.yml`, and that of buckets, which are named by it."""
_SELECTOR = re.compile(r"\b((?:vllm:|kvarena_|lmcache_)\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~?)"([^"]*)"')
_BY = re.compile(r"\bby \(([^)]*)\)")


@dataclass(frozen=True)
class Need:
    """A metric with the label values that a query names, as `{label: value}`; an alternative is a need of its own."""

    metric: str
    labels: Mapping[str, str]


def queries(window: str = "1m") -> list[str]:
    """All of them, over this window instead of what Grafana would put in."""
    panels = json.loads((FOLDER / "dashboards" / "kvarena.json").read_text())["panels"]
    texts = [target["expr"] for panel in panels for target in panel["targets"]]
    return [text.replace("$__rate_interval", window).replace("$__range", window) for text in texts]


def needs_of(query: str) -> list[Need]:
    needs = []
    for metric, matchers in _SELECTOR.findall(query):
        chosen = [
            (label, value.split("|") if op == "=~" else [value]) for label, op, value in _MATCHER.findall(matchers)
        ]
        assert bool(chosen) == bool(matchers), f"{matchers} is read by nobody"
        needs += [Need(metric, {label: value}) for label, values in chosen for value in values] or [Need(metric, {})]
    return needs


def labels_of(query: str) -> set[str]:
    """Those that a query groups by, which its metrics must have."""
    return {label.strip() for group in _BY.findall(query) for label in group.split(",")} - SCRAPED


def missing(exposition: str) -> set[str]:
    """The metrics that queries ask for and a server doesn't have, or not with the labels they name."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return {
        need.metric
        for query in queries()
        for need in needs_of(query)
        if not _has(found.get(need.metric, ()), need.labels, labels_of(query))
    }


def metrics_of_queries() -> set[str]:
    return {need.metric for query in queries() for need in needs_of(query)}


def _has(samples: Iterable[Mapping[str, str]], labels: Mapping[str, str], grouped_by: set[str]) -> bool:
    return any(labels.items() <= sample.items() and grouped_by <= sample.keys() for sample in samples)
