"""The dashboard's queries: real servers have their metrics and labels, Prometheus is told where those servers are, and
what it answers are the figures of the requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvarena.engines.store_metrics import StoreCollector
from kvarena.stack.settings import CONTENDERS, DEFAULT_PORTS
from support.ai100_engine import make_ai100
from support.dashboard import FOLDER, labels_of, metrics_of_queries, missing, needs_of, queries
from support.prefix_engine import make_prefix
from support.prometheus_server import prometheus
from support.real_server import RealServer, serving
from support.tiny_models import WORDS, save_tiny_model

CHAT = {"messages": [{"role": "user", "content": " ".join(WORDS)}], "max_tokens": 2}
OF_THE_BLEND = {"kvarena_blend_failures_total", "kvarena_blend_stage_seconds_sum", "kvarena_blend_stage_seconds_count"}
OF_LMCACHE = {metric for metric in metrics_of_queries() if metric.startswith("lmcache_")}


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.fixture(scope="module", params=["prefix", "ai100"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer[Any]]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "llama")
    engine = make_prefix(folder).engine if request.param == "prefix" else make_ai100(folder).engine
    with serving(engine, collectors=[StoreCollector(engine)]) as server:
        yield server


def test_the_engines_have_all_but_the_blends_own(server: RealServer[Any]) -> None:
    with server.client() as http:
        assert http.post("/v1/chat/completions", json=CHAT).is_success
        lacks = missing(http.get("/metrics").text)
    whole_memory = {"kvarena_store_bytes"} if server.engine.contender == "ai100" else set()
    assert lacks == OF_THE_BLEND | OF_LMCACHE | whole_memory


def test_a_query_is_read_as_prometheus_reads_it() -> None:
    query = 'sum by (contender, origin) (rate(kvarena_x_total{origin=~"a|b",engine="0"}[1m])) / rate(vllm:y_sum[1m])'
    assert [(need.metric, need.labels) for need in needs_of(query)] == [
        ("kvarena_x_total", {"origin": "a"}),
        ("kvarena_x_total", {"origin": "b"}),
        ("kvarena_x_total", {"engine": "0"}),
        ("vllm:y_sum", {}),
    ]
    assert labels_of(query) == {"origin"}


def test_what_the_issue_wants_is_drawn() -> None:
    titles = [panel["title"] for panel in json.loads((FOLDER / "dashboards" / "kvarena.json").read_text())["panels"]]
    wanted = ("Time to first token", "Hit ratio", "Recomputed share", "Store size", "Errors", "Requests", "tokens per")
    assert [part for part in wanted if not any(part in title for title in titles)] == []
    assert all(needs_of(query) or "up" in query for query in queries())


def test_prometheus_is_told_where_the_stacks_servers_are() -> None:
    addresses = {group["labels"]["contender"]: group["targets"] for group in read("targets.yml")}
    for contender in CONTENDERS:
        assert addresses[contender] == [f"127.0.0.1:{DEFAULT_PORTS[contender]}"]
    assert addresses["lmcache-server"] == [f"127.0.0.1:{DEFAULT_PORTS['lmcache_http']}"]
    in_containers = {group["labels"]["contender"]: group["targets"] for group in read("targets.containers.yml")}
    for contender, (target,) in in_containers.items():
        assert target.split(":")[1] == addresses[contender][0].split(":")[1]


def test_grafana_finds_prometheus_and_the_dashboard_by_one_name() -> None:
    (source,) = read("grafana/datasources/prometheus.yml")["datasources"]
    dashboard = json.loads((FOLDER / "dashboards" / "kvarena.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    (config,) = read("prometheus.yml")["scrape_configs"]
    assert config["file_sd_configs"] == [{"files": ["targets.yml"]}]
    assert source["jsonData"]["timeInterval"] == read("prometheus.yml")["global"]["scrape_interval"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def query_with(*parts: str) -> str:
    (found,) = [query for query in queries() if all(part in query for part in parts)]
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
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
