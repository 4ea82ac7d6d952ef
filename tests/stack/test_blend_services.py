"""What the blend is told: the settings, before the model's profile, before the defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvarena.home import Home, StackError
from support.planned_services import extra_config, make


def test_the_blend_is_set_by_the_models_profile(home: Home, tmp_path: Path) -> None:
    made, services = make(home, tmp_path, contenders="blend")
    profile = json.loads((Path(made.model.name) / "kvarena.json").read_text())
    assert profile.pop("data")
    config = extra_config(services["blend"])
    assert {key: config[key] for key in profile} == profile
    assert config["lmcache_url"] == "tcp://127.0.0.1:5555"
    assert config["lmcache_http_url"] == "http://127.0.0.1:8080"
    assert str(config["index_path"]).startswith(str(home.path))


def test_settings_win_over_the_models_profile(home: Home, tmp_path: Path) -> None:
    _, services = make(
        home, tmp_path, separator="\n\n# ; %", blend_policy="all", blend_ratio=0.5, blend_check_layer=3, port_base=9000
    )
    config = extra_config(services["blend"])
    assert config["separator"] == "\n\n# ; %"
    assert (config["policy"], config["ratio"], config["check_layer"]) == ("all", 0.5, 3)
    assert config["lmcache_url"] == "tcp://127.0.0.1:9502"


def test_what_happens_with_a_model_that_cant_be_blended(home: Home, tmp_path: Path) -> None:
    for chosen, expected in ({}, "refuse"), ({"blend_unsupported": "plain"}, "plain"):
        _, services = make(home, tmp_path, **chosen)
        assert extra_config(services["blend"])["unsupported"] == expected
    with pytest.raises(StackError, match="BLEND_UNSUPPORTED must be one of refuse, plain, not 'ignore'"):
        make(home, tmp_path, blend_unsupported="ignore")


@pytest.mark.parametrize(
    ("config", "keeps_all"),
    [
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}, True),
        ({"text_config": {"sliding_window": 512, "_sliding_window_pattern": 6}}, True),
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "sliding_attention"]}, False),
        ({"sliding_window": None, "layer_types": ["sliding_attention", "full_attention"]}, False),
        ({"sliding_window": 512}, False),
    ],
)
def test_some_layers_with_a_window_keep_all_kv(
    home: Home, tmp_path: Path, config: dict[str, Any], keeps_all: bool
) -> None:
    """vLLM's own option; for layers that are all alike it does nothing. `plain` stays as vLLM has it."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    _, services = make(home, tmp_path, model=str(tmp_path / "m"))
    assert ("--disable-hybrid-kv-cache-manager" in services["blend"].command) == keeps_all
    assert "--disable-hybrid-kv-cache-manager" not in services["plain"].command


def test_a_policy_that_is_none(home: Home, tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"BLEND_POLICY must be one of kv_deviation, .*, not 'magic'"):
        make(home, tmp_path, blend_policy="magic")


def test_a_broken_model_profile(home: Home, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "kvarena.json").write_text('{"sparator": "x"}')
    with pytest.raises(StackError, match="sparator"):
        make(home, tmp_path, model=str(tmp_path / "m"))
