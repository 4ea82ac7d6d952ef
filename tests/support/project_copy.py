"""A copy of the project that tests add a file to, with the examples of CONTRIBUTING.md, and programs in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from kvarena.home import project_root
from kvarena.stack.generate import SECTIONS


def copy_project(copy: Path) -> Path:
    """The package, and the files that have generated sections, into an empty folder; the rest is linked to."""
    root = project_root()
    shutil.copytree(root / "backend" / "kvarena", copy / "backend" / "kvarena", ignore=shutil.ignore_patterns("*.pyc"))
    for name in sorted({"pyproject.toml", *(section.path for section in SECTIONS)}):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, copy / name)
    for name in ("ai100", "data", "backend/models"):
        (copy / name).symlink_to(root / name)
    return copy


def example_of(section: str) -> str:
    """The first program in a section of CONTRIBUTING.md."""
    text = (project_root() / "CONTRIBUTING.md").read_text().partition(f"## {section}\n")[2]
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example, f"CONTRIBUTING.md has no program in {section}"
    return textwrap.dedent(example[1])


def run_in(copy: Path, *arguments: str, **settings: str) -> str:
    """What Python prints in the copy."""
    paths = os.pathsep.join((str(copy / "backend"), str(copy)))
    environment = os.environ | settings | {"PYTHONPATH": paths, "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
