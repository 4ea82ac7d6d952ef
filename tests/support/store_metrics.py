"""What a server's `/metrics` says of what its engine keeps."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families


def store_metrics(http: httpx.Client) -> dict[str, float]:
    """By name, without `kvarena_store_`, and outcome."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("kvarena_store_")]
    return {
        f"{sample.name.removeprefix('kvarena_store_')} {sample.labels.get('outcome', '')}".rstrip(): sample.value
        for sample in samples
    }
