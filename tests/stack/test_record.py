"""The record of what runs: read back, and compared with what is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kvarena.home import Home
from kvarena.splitting import Splitter
from kvarena.stack.record import Record, differences, read_record
from support.command_lines import make


def test_the_record_reads_back(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    record = Record(tuple(services.values()), "/tmp/s", "data", "town")
    home.create()
    record.write(home)
    assert read_record(home) == record
    assert differences(record, record) == []
    home.record.write_text("{}")
    assert read_record(home) is None


def test_differences_are_told_in_words(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path, ui=False)
    _, others = make(home, tmp_path, max_model_len=512, contenders="plain", data_dir=tmp_path / "notes")
    running = Record(tuple(services.values()), "", "data", "town")
    wanted = Record(tuple(others.values()), "", "notes", "town")
    lines = differences(running, wanted)
    assert "blend is running and was not asked for" in lines
    assert "page is not running" in lines
    assert "plain: --max-model-len is not set, not 512" in lines
    assert "data folder data, not notes" in lines


def test_of_a_json_option_only_the_keys_that_differ_are_shown(home: Home, tmp_path: Path) -> None:
    chosen = {"ui": False, "contenders": "blend", "blend_policy": "kv_deviation"}
    _, services = make(home, tmp_path, **chosen, blend_ratio=0.1, lmcache_l2="/chunks")
    _, others = make(home, tmp_path, **chosen, blend_ratio=0.3, lmcache_l2="redis://host")
    running = Record(tuple(services.values()), "", "data", "town")
    lines = differences(running, dataclasses.replace(running, services=tuple(others.values())))
    assert "blend: --kv-transfer-config.kv_connector_extra_config.ratio is 0.1, not 0.3" in lines
    assert "lmcache-server: --l2-adapter.type is fs_native, not resp" in lines
    assert "lmcache-server: --l2-adapter.port is not set, not 6379" in lines
    assert 'lmcache-server: --l2-adapter.eviction is {"eviction_policy": "LRU"}, not left out' in lines
    assert not [line for line in lines if "KVArenaConnector" in line]


def test_a_stack_splits_as_it_was_started(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    running = Record(tuple(services.values()), "", "data", "town", chunk_tokens=128, tokenizer_place="nowhere")
    home.create()
    running.write(home)
    again = read_record(home)
    assert again is not None
    assert again.splitter == Splitter(128)
    assert differences(running, dataclasses.replace(running, chunk_tokens=256)) == ["CHUNK_TOKENS is 128, not 256"]


def test_a_stack_without_a_key_is_not_the_one_that_asks_for_it(home: Home, tmp_path: Path) -> None:
    _, services = make(home, tmp_path)
    running = Record(tuple(services.values()), "", "data", "town")
    assert differences(running, dataclasses.replace(running, has_api_key=True)) == [
        "KVARENA_API_KEY is not set for what runs"
    ]
