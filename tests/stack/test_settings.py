"""Settings: command line before environment before `.env` before defaults; errors name the value and the choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvarena.contenders.spec import FIRST_PORT, contender_specs
from kvarena.home import StackError, project_root
from kvarena.stack.settings import SPECS, load_settings


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    return tmp_path / ".env"


def test_defaults(env_file: Path) -> None:
    settings = load_settings(env_file)
    assert settings.contenders == ("blend", "plain")
    assert settings.profile == "auto"
    assert settings.ports == {
        **{name: spec.port for name, spec in SPECS.items()},
        "page": 8501,
        "lmcache_server": 5555,
        "lmcache_http": 8080,
    }
    assert settings.data_dir is None
    assert settings.ui


def test_precedence(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env_file.write_text("MODEL=from-file\nKV_CACHE_GB=3\nBLEND_RATIO=0.3\n")
    monkeypatch.setenv("KV_CACHE_GB", "4")
    monkeypatch.setenv("BLEND_RATIO", "0.4")
    settings = load_settings(env_file, blend_ratio=0.5, model=None)
    assert settings.model == "from-file"
    assert settings.kv_cache_gb == 4
    assert settings.model_dump()["blend_ratio"] == 0.5


def test_quotes_keep_the_spaces_of_a_separator(env_file: Path) -> None:
    env_file.write_text('SEPARATOR=" # # "\n')
    assert load_settings(env_file).separator == " # # "


def test_an_empty_value_is_none(env_file: Path) -> None:
    env_file.write_text("HF_TOKEN=\nMODEL=\n")
    settings = load_settings(env_file)
    assert settings.hf_token is None
    assert settings.model is None


def test_the_token_is_not_shown(env_file: Path) -> None:
    env_file.write_text("HF_TOKEN=hf_secret\n")
    settings = load_settings(env_file)
    assert "hf_secret" not in repr(settings)
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "hf_secret"


def test_the_api_key_is_a_secret_and_vllms_servers_get_it_too(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(env_file).secrets == {"KVARENA_API_KEY": "", "VLLM_API_KEY": ""}
    env_file.write_text("KVARENA_API_KEY=of-the-file\nHF_TOKEN=hf\n")
    settings = load_settings(env_file)
    assert settings.secrets == {"HF_TOKEN": "hf", "KVARENA_API_KEY": "of-the-file", "VLLM_API_KEY": "of-the-file"}
    assert "of-the-file" not in repr(settings)
    monkeypatch.setenv("KVARENA_API_KEY", "of-the-environment")
    assert load_settings(env_file).api_key == "of-the-environment"


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(env_file: Path) -> None:
    env_file.write_text('KVARENA_API_KEY="two words"\n')
    with pytest.raises(StackError) as refused:
        load_settings(env_file)
    assert str(refused.value) == "KVARENA_API_KEY must be of letters, digits and signs of ASCII, without spaces"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODLE=x", "unknown key MODLE; known: .*MODEL"),
        ("CONTENDERS=blend,fast", f"CONTENDERS must be one of {', '.join(SPECS)}, not 'fast'"),
        ("CONTENDERS=,", f"CONTENDERS must be one of {', '.join(SPECS)}, not ''"),
        ("PROFILE=tpu", "PROFILE must be one of auto, cpu, gpu, ai100, not 'tpu'"),
        ("BLEND_RATIO=1.5", "BLEND_RATIO must be less than or equal to 1, not '1.5'"),
        ("BLEND_CHECK_LAYER=-1", "BLEND_CHECK_LAYER must be greater than or equal to 0, not '-1'"),
        ("KV_CACHE_GB=lots", "KV_CACHE_GB must be a valid integer.*not 'lots'"),
        ("KV_CACHE_GB=0", "KV_CACHE_GB must be greater than or equal to 1, not '0'"),
        ("LMCACHE_GB=0", "LMCACHE_GB must be greater than 0, not '0'"),
        ("BLEND_PORT=70000", "BLEND_PORT must be less than or equal to 65535, not '70000'"),
        ("PORT_BASE=65100", "PORT_BASE must be less than or equal to 65032, not '65100'"),
        ("SIMLLM_MODE=both", "SIMLLM_MODE must be one of aligned, top_layer, sandwich, not 'both'"),
        (
            "SIMLLM_SIMILARITY_THRESHOLD=2",
            "^SIMLLM_SIMILARITY_THRESHOLD must be auto or a number .*, not '2'$",
        ),
        ("SIMLLM_SIMILARITY_THRESHOLD=high", "must be auto or a number from -1 to 1, not 'high'"),
        ("SIMLLM_MAX_CACHE_SIZE=0", "SIMLLM_MAX_CACHE_SIZE must be greater than or equal to 1, not '0'"),
        ("AI100_RUNTIME=npu", "AI100_RUNTIME must be one of auto, qaic, host, onnx, not 'npu'"),
        ("AI100_TOPICS=words", "AI100_TOPICS must be one of keyword, embedding, not 'words'"),
        ("AI100_THRESHOLD=2", "AI100_THRESHOLD must be less than or equal to 1, not '2'"),
        ("AI100_KV_CACHE_BATCH_SIZE=0", "AI100_KV_CACHE_BATCH_SIZE must be greater than or equal to 1, not '0'"),
        ("LMCACHE_L2=http://x", r"LMCACHE_L2 must be none, redis://HOST\[:PORT\], .* a folder, .*, not 'http://x'$"),
        ("LMCACHE_L2=redis://", r"LMCACHE_L2 must be none, redis://HOST"),
        ("LMCACHE_L2=redis://host:port", r"LMCACHE_L2 must be none, redis://HOST.*; Port could not be cast .*'port'"),
        ("LMCACHE_L2=redis://:pw@host", "LMCACHE_L2 must not hold a password; that is LMCACHE_L2_PASSWORD"),
        ('LMCACHE_L2={"type": 3}', "LMCACHE_L2 must be .*; this object has no type"),
        ('LMCACHE_L2={"type"', "LMCACHE_L2 must be .*; this is no JSON"),
        ("LMCACHE_L2_GB=0", "LMCACHE_L2_GB must be greater than 0, not '0'"),
        ("LMCACHE_TIMEOUT_S=0", "LMCACHE_TIMEOUT_S must be greater than 0, not '0'"),
        ("MAX_MODEL_LEN=0", "MAX_MODEL_LEN must be greater than or equal to 1, not '0'"),
    ],
)
def test_errors_name_the_value_and_the_choices(env_file: Path, text: str, message: str) -> None:
    env_file.write_text(text + "\n")
    with pytest.raises(StackError, match=message):
        load_settings(env_file)


def test_every_wrong_value_is_named_at_once(env_file: Path) -> None:
    env_file.write_text("PROFILE=tpu\nMODLE=x\n")
    with pytest.raises(StackError) as error:
        load_settings(env_file)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["plain,blend", "blend, plain", "plain,blend,plain"])
def test_contenders_come_once_each_in_one_order(env_file: Path, text: str) -> None:
    assert load_settings(env_file, contenders=text).contenders == ("blend", "plain")


def test_port_rule(env_file: Path) -> None:
    env_file.write_text("PORT_BASE=9000\nPLAIN_PORT=9999\n")
    services = {"page": 501, "lmcache_server": 502, "lmcache_http": 503}
    distances = {**{name: spec.port - FIRST_PORT for name, spec in contender_specs().items()}, **services}
    assert [distances[name] for name in ("blend", "plain", "prefix", "simllm", "ai100", "lmcache")] == list(range(6))
    moved = {name: 9000 + distance for name, distance in distances.items()}
    assert load_settings(env_file).ports == {**moved, "plain": 9999}
    on_command_line = load_settings(env_file, port_base=7000)
    assert on_command_line.ports == {name: 7000 + distance for name, distance in distances.items()}


def test_relative_folders_count_from_the_project(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(env_file.parent)
    env_file.write_text("DATA_DIR=notes\nRESULTS_DIR=measured\nLOCAL_HF_HOME=~/models\nAI100_TOPICS_FILE=topics.yaml\n")
    settings = load_settings(env_file)
    assert settings.data_dir == project_root() / "notes"
    assert settings.results_dir == project_root() / "measured"
    assert settings.local_hf_home == Path.home() / "models"
    assert settings.of_contender("ai100").topics_file == project_root() / "topics.yaml"


def test_the_example_lists_every_key_with_its_default(env_file: Path) -> None:
    from kvarena.stack.settings import Settings

    lines = (project_root() / ".env.example").read_text().splitlines()
    settings = [line.removeprefix("#") for line in lines if line.startswith("#") and not line.startswith("# ")]
    assert {line.partition("=")[0] for line in settings} == {name.upper() for name in Settings.model_fields}

    env_file.write_text("\n".join(settings))
    shown, defaults = load_settings(env_file), load_settings(env_file.with_name("none"))
    assert shown.ports == defaults.ports
    for name in ("contenders", "profile", "ui", "data_dir", "results_dir", "lmcache_gb", "hf_token", "local_hf_home"):
        assert getattr(shown, name) == getattr(defaults, name)
