"""The specs: light to import, in one order, and saying what the servers' own command lines have as defaults."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvarena.contenders
from kvarena.contenders import spec as specs
from kvarena.contenders.spec import ContenderSpec, contender_specs
from support.command_lines import ENGINES, command_of


def test_contenders_are_in_the_order_of_their_ports() -> None:
    known = ["blend", "plain", "prefix", "simllm", "ai100", "lmcache"]
    assert {name: contender_specs()[name].port for name in known} == dict(zip(known, range(8000, 8006), strict=True))
    ports = [spec.port for spec in contender_specs().values()]
    assert ports == sorted(set(ports))


def test_reading_the_specs_imports_no_engine() -> None:
    program = "import sys; from kvarena.contenders.spec import contender_specs; contender_specs(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "kvarena.contenders.simllm.spec" in loaded
    assert not {"torch", "vllm", "lmcache", "transformers", "fastapi", "pydantic", "ai100"}.intersection(loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 8400}, "two contenders are called plain"),
        ({"name": "other"}, "the contenders (plain and other|other and plain) have one port, 8001"),
    ],
)
def test_two_with_one_name_or_port_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    plain = contender_specs()["plain"]

    def both() -> Iterator[ContenderSpec]:
        yield from (plain, dataclasses.replace(plain, **changes))

    monkeypatch.setattr(specs, "_specs", both)
    with pytest.raises(ValueError, match=message):
        contender_specs.__wrapped__()


@dataclasses.dataclass(frozen=True)
class Undeclared:
    num_words: int = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "my server"}, "small letters and digits, not 'my server'"),
        ({"name": "page"}, "can't be called page: that is a service of the stack"),
        ({"port": 8501}, "plain: its port is from 8000 to 8500, not 8501"),
        ({"port": 7990}, "from 8000 to 8500, not 7990"),
        ({"settings": Undeclared}, r"plain: declare num_words with setting\(\.\.\.\)"),
    ],
)
def test_what_a_contender_cant_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(contender_specs()["plain"], **changes)


def test_a_folder_without_a_spec_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo").mkdir()
    (tmp_path / "echo" / "__init__.py").touch()
    (tmp_path / "echo" / "spec.py").touch()
    monkeypatch.setattr(kvarena.contenders, "__path__", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"kvarena\.contenders\.echo\.spec has no SPEC"):
        list(specs._specs())


def test_without_options_only_memory_bounds_the_prefix_cache() -> None:
    defaults = {option.name: option.default for option in command_of(contender_specs()["prefix"]).params}
    assert (defaults["max_entries"], defaults["max_age_s"]) == (None, None)


@pytest.mark.parametrize("spec", ENGINES, ids=lambda spec: spec.name)
def test_the_defaults_shown_are_the_servers_own(spec: ContenderSpec) -> None:
    defaults = {option.name: option.default for option in command_of(spec).params}
    assert defaults["port"] == spec.port
    for own in spec.own_settings():
        if defaults[own.name] is not None:
            assert defaults[own.name] == own.shown, own.key
