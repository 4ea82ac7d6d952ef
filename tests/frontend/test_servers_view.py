"""What the drawer shows of a server, from the text of `/metrics` and its log's lines."""

from __future__ import annotations

import json

import pytest

from chat_session import StoreSession
from contender_api import ContenderError
from servers_view import Watched, lmcache_watched, read_metrics, server_html
from settings import Service
from support.small_openai_server import StartServer

METRICS = """# HELP kvarena_store_bytes Memory.
process_resident_memory_bytes 1.073741824e+09
kvarena_server_memory_bytes 2.147483648e+09
vllm:kv_cache_usage_perc{engine="0",model_name="town"} 0.25
vllm:num_requests_running{engine="0",model_name="town"} 1.0
vllm:num_requests_running{engine="1",model_name="town"} 2.0
vllm:num_requests_waiting{engine="0",model_name="town"} 4.0
kvarena_store_bytes{engine="0"} 1.048576e+06
kvarena_store_entries{engine="0"} 3.0
kvarena_store_lookups_total{engine="0",model_name="town",outcome="hits"} 6.0
kvarena_store_lookups_total{engine="0",model_name="town",outcome="misses"} 18.0
"""


def test_state_memory_and_store_are_read_from_metrics() -> None:
    html = server_html("blend", "<Blend>", Watched((), read_metrics(METRICS)), "")
    assert "<b>&lt;Blend&gt;</b>" in html
    assert "3 running, 4 waiting · 25% of the KV cache in use · 2.00 GiB of memory · " in html
    assert "store: 3 entries, 1.0 MiB · looked up: 6 found, 18 not" in html
    assert "No log line of this request yet." in html
    assert read_metrics("") == {}


@pytest.mark.parametrize(("wanted", "shown"), [("", ["id", "total_ms", "misses", "fetch_ms"]), ("FETCH", ["fetch_ms"])])
def test_a_log_line_is_its_figures_as_far_as_they_are_wanted(wanted: str, shown: list[str]) -> None:
    line = {"id": "<x>", "total_ms": 12.5, "misses": {"evicted": 1}, "details": {"fetch_ms": 1.5}}
    html = server_html("blend", "Blend", Watched((json.dumps(line),), {}), "", wanted)
    assert [part.partition("<")[0] for part in html.split("<dt>")[1:]] == shown
    assert "<x>" not in html
    unknown = server_html("blend", "Blend", Watched((json.dumps(line),), {}), "", "nobody")
    assert "Nothing in this line matches." in unknown


def test_a_server_that_is_down_says_why() -> None:
    assert "gone &amp; away" in server_html("blend", "Blend", None, "gone & away")


def test_of_a_stock_server_the_memory_of_the_main_process_is_known() -> None:
    html = server_html("vllm", "vLLM", Watched((), read_metrics("process_resident_memory_bytes 1.0e+09")), "")
    assert "<small>953.7 MiB of memory in its main process</small>" in html


MEMORY = {"is_healthy": True, "total_object_count": 1200, "memory_used_bytes": 1 << 20, "memory_total_bytes": 1 << 28}


@pytest.mark.parametrize(("is_healthy", "state"), [(True, "healthy"), (False, "not healthy")])
def test_the_lmcache_server_has_its_state_its_memory_and_how_full_it_is(is_healthy: bool, state: str) -> None:
    watched = lmcache_watched(MEMORY | {"is_healthy": is_healthy}, {"main_process_bytes": 1 << 29})
    html = server_html("lmcache-server", "LMCache server", watched, "")
    told = f"{state} · 512.0 MiB of memory in its main process · store: 1,200 entries, 1.0 MiB of 256.0 MiB"
    assert f"<small>{told}</small>" in html
    assert "It isn&#x27;t told whose request it serves:" in html


def test_a_server_that_is_not_of_lmcache_is_named(small_server: StartServer) -> None:
    session = StoreSession(Service("store", "The store", small_server().url))
    with pytest.raises(ContenderError, match="The store: HTTP 404"):
        session.watch().result()
    session.close()


def test_a_store_that_is_down_says_where_it_was_looked_for(small_server: StartServer) -> None:
    server = small_server()
    server.stop()
    session = StoreSession(Service("store", "The store", server.url))
    with pytest.raises(ContenderError, match=f"Nothing answers at {server.url}.*logs store say more"):
        session.watch().result()
    session.close()
