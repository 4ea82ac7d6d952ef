"""The Dockerfiles' rules: what hadolint asks for, and what it can't know of this project."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvarena.stack.home import project_root

DOCKERFILES = [
    "backend/Dockerfile",
    "backend/Dockerfile.engines",
    "backend/Dockerfile.gpu",
    "frontend/Dockerfile",
    "ai100/Dockerfile",
]


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) in their order, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (project_root() / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def arguments(name: str, instruction: str) -> list[str]:
    return [rest for word, rest in instructions(name) if word == instruction]


def test_every_dockerfile_is_looked_at() -> None:
    there_are = {str(path.relative_to(project_root())) for path in project_root().glob("*/Dockerfile*")}
    assert there_are == set(DOCKERFILES)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_rules(name: str) -> None:
    bases = [rest for rest in arguments(name, "ARG") if "IMAGE=" in rest]
    assert bases, "the base image can be chosen"
    assert all(re.search(r":v?\d+\.\d+\.\d+", base) for base in bases), "and is pinned"
    assert all(image.startswith("${") for image in arguments(name, "FROM"))
    assert len(arguments(name, "FROM")) >= 2, "what builds isn't in the image"
    assert not arguments(name, "ADD")
    assert all(rest.startswith("[") for word in ("CMD", "ENTRYPOINT") for rest in arguments(name, word))
    (user,) = arguments(name, "USER")
    assert user.split(":")[0] == "1000"
    (check,) = arguments(name, "HEALTHCHECK")
    assert "/health" in check
    for run in arguments(name, "RUN"):
        if "apt-get install" in run:
            assert "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists/*" in run


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_last_stage_has_no_compiler(name: str) -> None:
    steps = instructions(name)
    last = max(i for i, (word, _) in enumerate(steps) if word == "FROM")
    assert not any("apt-get" in rest or "build-essential" in rest for word, rest in steps[last:] if word == "RUN")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    shown = [line[1:] for line in (project_root() / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for copy in arguments(name, "COPY"):
        if copy.startswith("--from"):
            continue
        for source in copy.split()[:-1]:
            assert (project_root() / source).exists()
            assert any(Path(source).match(pattern) or source.startswith(f"{pattern}/") for pattern in shown), source


def test_hadolint() -> None:
    tool = Path(sys.executable).with_name("hadolint")
    subprocess.run([str(tool), *DOCKERFILES], cwd=project_root(), check=True)


def test_shellcheck() -> None:
    tool = shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted((project_root() / "containers").glob("*.sh"))
    subprocess.run([tool, "-x", *map(str, scripts)], cwd=project_root(), check=True)
