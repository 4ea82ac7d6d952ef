"""Reading logs: the end of a file, one start of a service in it, and the exception that began the trouble."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvarena.home import Home, StackError
from kvarena.stack.logs import find_log, first_exception, read_start, tail


def test_tail(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"one\ntwo \xff\nthree\n")
    assert tail(path, 2) == "two \ufffd\nthree"
    assert tail(path, 0) == ""
    assert tail(path, 5, since_byte=4) == "two \ufffd\nthree"
    assert tail(path, 1, since_byte=1000) == "three", "it was rotated meanwhile"
    assert tail(tmp_path / "none", 5) == ""


def test_a_restart_is_not_part_of_the_start_before(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    before = "kvarena: starting a\nold\n"
    path.write_text(before + "kvarena: starting a\nboom\nkvarena: starting a\n")
    assert read_start(path, len(before)) == ["kvarena: starting a", "boom"]


def test_first_exception() -> None:
    lines = [
        "(APIServer pid=1) WARNING like `OSError: [Errno 24] Too many open files`",
        "(Worker pid=2) ERROR 11-20 23:36:15 [x.py:10]     raise KeyError(e)",
        "(Worker pid=2) ERROR 11-20 23:36:15 [x.py:10] torch.InductorError: no compiler",
        "RuntimeError: Engine core initialization failed.",
    ]
    assert first_exception(lines) == "torch.InductorError: no compiler"
    assert first_exception(lines[-1:]) == "RuntimeError: Engine core initialization failed."
    assert first_exception(lines[:2]) == ""


def test_find_log_names_the_choices(home: Home) -> None:
    with pytest.raises(StackError, match="nothing was started yet"):
        find_log(home, "blend")
    home.create()
    home.log("plain").write_text("x")
    with pytest.raises(StackError, match="no log of 'blend'; there are logs of plain"):
        find_log(home, "blend")
    assert find_log(home, "plain") == home.log("plain")
    with pytest.raises(StackError, match="no log of"):
        find_log(home, "../../etc/passwd")
