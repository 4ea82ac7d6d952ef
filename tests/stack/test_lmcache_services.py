"""LMCache among the services: its server and second tier, its own connector, its own blender."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvarena.home import Home, StackError, project_root
from kvarena.stack.lmcache_l2 import bound_bytes, clear_folder, l2_adapter, prune, size_bytes
from kvarena.stack.services import build_services
from support.command_lines import extra_config, make, parsed, shared_memory, with_gpus


def l2_adapters(options: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(adapter) for adapter in options["l2_adapter"] or []]


@pytest.mark.usefixtures("two_cores")
def test_lmcaches_own_connector_is_stock_vllm_on_the_same_server(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, contenders="lmcache,plain", port_base=9000)
    assert list(services) == ["lmcache-server", "plain", "lmcache", "page"]
    lmcache, plain, server = services["lmcache"], services["plain"], services["lmcache-server"]
    assert (lmcache.port, server.port, lmcache.depends_on) == (9005, 9502, ("lmcache-server",))
    assert lmcache.environment["VLLM_PLUGINS"] == ""
    options, stock = parsed(lmcache), parsed(plain)
    connector = options["kv_transfer_config"]
    assert connector.kv_connector == "FailSafeLMCacheConnector"
    assert connector.kv_load_failure_policy == "recompute", "else a prefix that can't be loaded is an error"
    settings = connector.kv_connector_extra_config
    assert f"{settings['lmcache.mp.host']}:{settings['lmcache.mp.port']}" == server.address
    assert parsed(server)["chunk_size"] % options["block_size"] == 0
    assert {name for name in stock if options[name] != stock[name]} == {"port", "kv_transfer_config", "block_size"}


def test_the_server_shares_its_memory_on_a_gpu_too(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default LMCache takes memory bit by bit where it can be pinned. That isn't shared: all KV would be pickled."""
    with_gpus(monkeypatch, "0")
    _, services = make(home, tmp_path, profile="gpu")
    options = parsed(services["lmcache-server"])
    assert shared_memory(options, monkeypatch) == f"lmcache_l1_pool_{home.shm_name}"
    assert shared_memory(options | {"l1_use_lazy": True}, monkeypatch) == ""


def test_on_a_gpu_lmcaches_connector_takes_vllms_own_blocks(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, "0")
    _, services = make(home, tmp_path, profile="gpu", contenders="lmcache")
    assert parsed(services["lmcache"])["block_size"] is None


def test_a_blend_in_memory_doesnt_wait_for_the_server_of_another(home: Home, tmp_path: Path) -> None:
    plan, _ = make(home, tmp_path, contenders="blend,lmcache")
    services = build_services(dataclasses.replace(plan, blend=dataclasses.replace(plan.blend, store="memory")), home)
    assert {service.name: service.depends_on for service in services[:3]} == {
        "lmcache-server": (),
        "blend": (),
        "lmcache": ("lmcache-server",),
    }


@pytest.mark.parametrize(
    ("place", "adapter"),
    [
        ("redis://cache:6380", {"type": "resp", "host": "cache", "port": 6380}),
        ("valkey://me@cache", {"type": "resp", "host": "cache", "port": 6379, "username": "me"}),
        ('{"type": "s3", "s3_region": "r"}', {"type": "s3", "s3_region": "r"}),
        (
            "kept",
            {
                "type": "fs_native",
                "base_path": str(project_root() / "kept"),
                "max_capacity_gb": 1.5,
                "eviction": {"eviction_policy": "LRU"},
            },
        ),
    ],
)
def test_lmcaches_second_tier(home: Home, tmp_path: Path, place: str, adapter: dict[str, object]) -> None:
    _, services = make(home, tmp_path, lmcache_l2=place, lmcache_l2_gb=3)
    options = parsed(services["lmcache-server"])
    assert l2_adapters(options) == [adapter]
    assert options["l2_prefetch_policy"] == "retain"
    _, services = make(home, tmp_path, lmcache_l2="none")
    assert l2_adapters(parsed(services["lmcache-server"])) == []


def test_a_folder_of_the_stack_is_the_default_second_tier(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    (adapter,) = l2_adapters(parsed(services["lmcache-server"]))
    assert adapter["base_path"] == str(home.path / "chunks")
    assert bound_bytes(adapter) == 4 << 30


def pruned(folder: Path) -> int:
    return prune(l2_adapter(str(folder), 2 / 2**30, folder))


@pytest.mark.parametrize("num_bytes_in", [size_bytes, clear_folder, pruned])
def test_a_chunk_that_lmcache_evicts_meanwhile_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes_in: Callable[[Path], int]
) -> None:
    """`status`, `up` and a start died with `FileNotFoundError`, whichever moment LMCache took the file in."""
    stat = Path.stat
    before, after = tmp_path / "model@0x01@0@0.data", tmp_path / "model@0x01@0@1.data"
    for path in (before, after, tmp_path / "model@0x01@0@2.data"):
        path.write_bytes(b"1234")

    def stat_and_evict(path: Path, **how: Any) -> os.stat_result:
        if path == before:
            path.unlink(missing_ok=True)
        found = stat(path, **how)
        if path == after:
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", stat_and_evict)
    assert num_bytes_in(tmp_path) == 8


def test_what_earlier_runs_left_is_bounded(tmp_path: Path) -> None:
    """LMCache bounds what it writes itself; the rest, least recently used first, goes before it starts."""
    adapter = l2_adapter(str(tmp_path), 20 / 2**30, tmp_path)
    for second in range(5):
        path = tmp_path / f"model@0x01@0@{second}.data"
        path.write_bytes(b"1234")
        os.utime(path, (second, second))
    (tmp_path / "note.txt").write_text("not LMCache's")
    assert size_bytes(tmp_path) == 20
    assert prune(adapter) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model@0x01@0@3.data",
        "model@0x01@0@4.data",
        "note.txt",
    ]
    assert prune(adapter) == 0
    assert prune({"type": "resp", "host": "x", "port": 1}) == 0
    assert clear_folder(tmp_path) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_lmcaches_own_blender_is_a_form_of_blend(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, "0", "1")
    chosen = {
        "profile": "gpu",
        "blend_engine": "lmcache",
        "separator": "@@",
        "blend_ratio": 0.3,
        "blend_check_layer": 2,
    }
    _, services = make(home, tmp_path, **chosen)
    assert list(services) == ["blend", "plain", "page"], "its chunks lie in its own process"
    blend = services["blend"]
    assert "VLLM_PLUGINS" not in blend.environment, "our plugin registers the model"
    assert parsed(blend)["enable_prefix_caching"] is False
    assert parsed(blend)["middleware"] == parsed(services["plain"])["middleware"]
    extra = extra_config(blend)
    assert (extra["lmcache.blend_special_str"], extra["lmcache.blend_recompute_ratios"]) == ("@@", [0.3])
    assert (extra["lmcache.blend_check_layers"], extra["lmcache.max_local_cpu_size"]) == ([2], 1.0)
    shown = json.loads(services["page"].environment["KVARENA_CONTENDERS"])
    assert [contender.get("approximate", False) for contender in shown] == [True, False]


def test_what_lmcaches_own_blender_cant_do_is_refused_before_anything_starts(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StackError, match=r"BLEND_ENGINE is lmcache, .* needs a GPU; on a CPU it must be kvarena"):
        make(home, tmp_path, blend_engine="lmcache")
    with_gpus(monkeypatch, "0")
    with pytest.raises(StackError, match=r"BLEND_ENGINE is lmcache, and .* policy 'kv_deviation' only, not 'all'"):
        make(home, tmp_path, profile="gpu", blend_engine="lmcache", blend_policy="all")
    with pytest.raises(StackError, match="BLEND_ENGINE must be one of kvarena, lmcache, not 'both'"):
        make(home, tmp_path, blend_engine="both")
