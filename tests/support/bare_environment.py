"""A Python in which nothing can be imported but what some of the project's extras bring."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "kvarena"
ABSENT = """
import json, sys
absent = set(json.load(sys.stdin))

class Without:
    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self._finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def absent_modules(*extras: str) -> list[str]:
    """Those of this environment that wouldn't be there."""
    installed = _needed_by(Requirement(f"{PROJECT}[{','.join(extras)}]"))
    return [
        module
        for module, names in packages_distributions().items()
        if not installed & {canonicalize_name(name) for name in names}
    ]


def run_without(absent: list[str], program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ABSENT + program, *arguments]
    return subprocess.run(command, cwd=ROOT, input=json.dumps(absent), text=True, capture_output=True, check=False)


def _needed_by(requirement: Requirement) -> set[str]:
    """The distributions that are installed along with it."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [requirement]
    while waiting:
        one = waiting.pop()
        extras = frozenset(one.extras)
        if (key := (canonicalize_name(one.name), extras)) in found:
            continue
        found.add(key)
        for own in _requirements(one.name, extras):
            if own.marker is None or any(own.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                waiting.append(own)
    return {name for name, _ in found}


def _requirements(name: str, extras: frozenset[str]) -> list[Requirement]:
    if name != PROJECT:
        return list(map(Requirement, requires(name) or ()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return list(map(Requirement, [*project["dependencies"], *optional]))
