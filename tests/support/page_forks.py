"""The page in processes of its own, as forks of one that has imported Streamlit and all that the page needs: importing
takes most of a page's start.

    python page_forks.py       reads {"arguments", "environment", "folder"} as lines of JSON, and answers with pids
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path

IMPORTS = (
    "altair",
    "httpx",
    "kvarena.client",
    "kvarena.documents",
    "kvarena.panels.kinds",
    "pandas",
    "pydantic.dataclasses",
    "streamlit.web.bootstrap",
    "streamlit.web.cli",
    "tokenizers",
)
FRONTEND = Path(__file__).resolve().parents[2] / "frontend"


@contextmanager
def forked_page(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[int]:
    """The process of `streamlit run` with these arguments; it is gone after."""
    source = _source()
    assert source.stdin
    assert source.stdout
    order = {"arguments": arguments, "environment": dict(environment), "folder": str(FRONTEND)}
    source.stdin.write(json.dumps(order) + "\n")
    source.stdin.flush()
    pid = int(source.stdout.readline())
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)


@cache
def _source() -> subprocess.Popen[str]:
    """Ends with this process, which closes its input."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main() -> None:
    sys.path.insert(0, str(FRONTEND))
    for name in IMPORTS:
        import_module(name)

    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child is waited for
    for line in sys.stdin:
        order = json.loads(line)
        if pid := os.fork():
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv = ["streamlit", *order["arguments"]]
        runpy.run_module("streamlit", run_name="__main__")


if __name__ == "__main__":
    main()
