"""The Dockerfiles' rules: what hadolint asks for, and what it can't know of this project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvarena.home import Home, project_root
from kvarena.model import DEFAULT_CPU_MODEL, default_model_folder

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
    stages = [image.partition(" AS ")[::2] for image in arguments(name, "FROM")]
    assert all(image.startswith("${") or image in {stage for _, stage in stages} for image, _ in stages)
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


@pytest.mark.parametrize("name", ["backend/Dockerfile", "backend/Dockerfile.engines"])
def test_images_for_a_cpu_bring_the_default_model(name: str) -> None:
    folder = default_model_folder(Home(Path("/home")))
    (place,) = (rest for rest in arguments(name, "COPY") if rest.startswith(f"--from=model {folder} "))
    (workdir,) = (rest for rest in arguments(name, "WORKDIR") if rest != "/src")
    assert place.split()[-1] == f"{workdir}/{DEFAULT_CPU_MODEL}", "where MODEL is looked for"
    assert f"MODEL={DEFAULT_CPU_MODEL}" in " ".join(arguments(name, "ENV")).split()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_last_stage_has_no_compiler(name: str) -> None:
    steps = instructions(name)
    last = max(i for i, (word, _) in enumerate(steps) if word == "FROM")
    words = {word for instruction, rest in steps[last:] if instruction == "RUN" for word in rest.split()}
    assert not words & {"build-essential", "gcc", "g++", "clang", "cmake", "git", "python3-dev"}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    shown = [line[1:] for line in (project_root() / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for copy in arguments(name, "COPY"):
        if copy.startswith("--from"):
            continue
        for source in copy.split()[:-1]:
            assert (project_root() / source).exists()
            assert any(Path(source).match(pattern) or source.startswith(f"{pattern}/") for pattern in shown), source


FAKE_PYTHON = """#!/bin/sh
case "$*" in
*"pip list"*) printf 'Torch==2.13.0+cu130\\nflash_attn==2.8\\nlmcache==0.4.0\\npip==25\\n' ;;
*"pip install"*)
    while [ "$1" != -c ]; do shift; done
    cp "$2" "$SEEN"
    echo "$3" ;;
esac
"""


def test_the_gpu_image_keeps_what_it_has_and_pins_the_rest(tmp_path: Path) -> None:
    (tmp_path / "python3").write_text(FAKE_PYTHON)
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "gpu.txt").write_text("# pins\ntorch==2.13.0\nflash-attn==2.7\nlmcache==0.5.6\nruamel.yaml==0.19\n")
    seen = tmp_path / "seen"
    done = subprocess.run(
        ["sh", str(project_root() / "containers" / "install-gpu.sh"), "kvarena.whl", str(tmp_path / "gpu.txt")],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(seen)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "kvarena.whl[gpu]\n"
    assert seen.read_text().split() == ["torch==2.13.0+cu130", "flash-attn==2.8", "lmcache==0.5.6", "ruamel-yaml==0.19"]


def test_hadolint() -> None:
    tool = Path(sys.executable).with_name("hadolint")
    subprocess.run([str(tool), *DOCKERFILES], cwd=project_root(), check=True)


def test_shellcheck() -> None:
    tool = shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted((project_root() / "containers").glob("*.sh"))
    subprocess.run([tool, "-x", *map(str, scripts)], cwd=project_root(), check=True)
