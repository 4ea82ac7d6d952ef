"""The dashboard's queries on a real Prometheus that scrapes real servers: figures are those of the requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvarena.engines.store_metrics import StoreCollector
from support.dashboard import queries
from support.prefix_engine import make_prefix
from support.prometheus_server import prometheus
from support.real_server import serving
from support.tiny_models import WORDS, save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def query_with(*parts: str) -> str:
    (found,) = [query for query in queries() if all(part in query for part in parts)]
    return found


def test_figures_are_those_of_the_requests(tmp_path: Path) -> None:
    engine = make_prefix(save_tiny_model(tmp_path / "llama")).engine
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": " ".join(WORDS * 8)}], "max_tokens": 4}
    with serving(engine, collectors=[StoreCollector(engine)]) as server, server.client() as http:
        targets = {"prefix": server.url, "plain": "http://127.0.0.1:9"}
        with prometheus(tmp_path, targets) as watched:
            assert watched.wait_for("count_over_time(up[1m])", lambda seen: min(seen.values(), default=0) >= 2)
            answers = [http.post("/v1/chat/completions", json=chat).json() for _ in range(3)]
            reports = [answer["kv_transfer_params"]["kvarena"] for answer in answers]
            reused = sum(report["num_reused_tokens"] for report in reports)
            prompt = sum(report["num_prompt_tokens"] for report in reports)
            assert 0 < reused < prompt
            expected = pytest.approx({("prefix",): reused / prompt})
            assert watched.wait_for(query_with("prompt_tokens_cached"), lambda seen: seen == expected) == expected
            assert watched.values(query_with('outcome="hits"')) == pytest.approx({("prefix",): 2 / 3})
            assert watched.values(query_with("kvarena_store_bytes")) == {("prefix",): engine.cache.stats().num_bytes}
            assert watched.values(query_with("up", "max_over_time")) == {("prefix",): 1}
            median, p95 = (watched.values(query_with(f"histogram_quantile({q},")) for q in ("0.5", "0.95"))
            assert 0 < median["prefix",] <= p95["prefix",]
            for query in queries():
                watched.values(query)
