"""The page starts where only its own requirements are installed: it talks HTTP, and needs no engine."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    absent = set(json.load(sys.stdin))

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in self.absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from streamlit.testing.v1 import AppTest
page = AppTest.from_file("frontend/app.py", default_timeout=60).run()
assert not page.exception, page.exception
assert "Contenders" in [heading.value for heading in page.sidebar.subheader]
"""


def needed_by(requirement: Requirement) -> set[str]:
    """The distributions that are installed along with it."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [requirement]
    while waiting:
        one = waiting.pop()
        extras = frozenset(one.extras)
        if (key := (canonicalize_name(one.name), extras)) in found:
            continue
        found.add(key)
        for own in map(Requirement, requires(one.name) or ()):
            if own.marker is None or any(own.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                waiting.append(own)
    return {name for name, _ in found}


@pytest.mark.timeout(120)
def test_the_page_starts_where_nothing_else_is_installed() -> None:
    lines = (ROOT / "frontend" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [".[ui]"]
    installed = needed_by(Requirement("kvarena[ui]"))
    absent = [
        module
        for module, names in packages_distributions().items()
        if not installed & {canonicalize_name(name) for name in names}
    ]
    assert {"torch", "vllm", "transformers", "lmcache", "fastapi"} <= set(absent)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, input=json.dumps(absent), text=True, stderr=subprocess.PIPE
    )
    assert run.returncode == 0, run.stderr
