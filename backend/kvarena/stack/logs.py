"""The services' log files: their last lines, and following them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kvarena.home import Home, StackError

MAX_TAIL_BYTES = 1 << 20
MAX_LINES_OF_START = 10_000
START_MARK = "kvarena: starting "
"""`launch` begins a service's log with it, each time."""
EXCEPTION = re.compile(r"^(?:\(.*?\) ERROR .*?\] )?(?P<exception>[\w.]*(?:Error|Exception): .+)$")


def tail(path: str | Path, num_lines: int, since_byte: int = 0) -> str:
    """The last lines of a file, of what was written after `since_byte`; empty when there is no such file.

    A file that is shorter than `since_byte` was rotated meanwhile and is taken from its beginning.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            first = since_byte if since_byte <= size else 0
            file.seek(max(first, size - MAX_TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-num_lines:]) if num_lines else ""


def read_start(path: str | Path, since_byte: int) -> list[str]:
    """What one start of a service has logged: from `since_byte` to where it was started once more, if it was."""
    lines = tail(path, MAX_LINES_OF_START, since_byte).splitlines()
    again = [i for i, line in enumerate(lines) if line.startswith(START_MARK)][1:]
    return lines[: again[0]] if again else lines


def first_exception(lines: Sequence[str]) -> str:
    """The first line that names an exception, without a logger's prefix; empty when none does.

    A server of several processes logs the cause first and its consequences last.
    """
    return next((match["exception"] for line in lines if (match := EXCEPTION.match(line))), "")


def size_of(path: str | Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def find_log(home: Home, name: str) -> Path:
    """The log of a service; raises `StackError` naming the logs there are."""
    names = sorted(path.stem for path in home.logs.glob("*.log"))
    if name not in names:
        there_are = f"there are logs of {', '.join(names)}" if names else "nothing was started yet"
        raise StackError(f"no log of {name!r}; {there_are}")
    return home.log(name)


def follow(path: Path, num_lines: int) -> NoReturn:
    """Becomes `tail -F`, which goes on with the new file when the log is rotated."""
    program = shutil.which("tail")
    if program is None:
        raise StackError(f"following needs the program tail; the log is {path}")
    os.execv(program, ["tail", "-n", str(num_lines), "-F", str(path)])
