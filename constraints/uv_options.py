"""Print pip's configuration as options of `uv pip install`, one word a line: uv reads none of it itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
}


def pip_settings() -> dict[str, str]:
    """pip's settings for an install; environment variables win over files, and `[install]` over `[global]`."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = {}
    for section in ("global.", "install.", ":env:."):
        for line in lines:
            key, _, value = line.partition("=")
            if key.startswith(section):
                settings[key.removeprefix(section)] = str(ast.literal_eval(value))
    return settings


def uv_options(settings: dict[str, str]) -> list[str]:
    """The same for uv. Folders that aren't there are left out: pip only warns of them, and uv fails."""
    options = []
    for key, option in OPTIONS.items():
        for value in settings.get(key, "").split():
            place = value.removeprefix("file://")
            if not place.startswith("/") or Path(place).exists():
                options += [option, value]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    if "cert" in settings:
        options.append("--system-certs")
    return options


if __name__ == "__main__":
    print("\n".join(uv_options(pip_settings())))
