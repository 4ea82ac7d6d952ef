"""Peaks of main memory, of this process and of others with what they started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvarena.bench.measure import PeakMemory

RISE_AND_REST = """
import mmap
from kvarena.bench.measure import PeakMemory

memory = PeakMemory()
memory.start()
with mmap.mmap(-1, 64 << 20) as block:
    block.write(b"x" * len(block))
print(memory.rise_bytes())
memory.start()
print(memory.rise_bytes())
"""
"""Pages that were never there before, in a process in which nothing else comes or goes."""


def test_the_rise_of_memory_is_seen_once() -> None:
    printed = subprocess.run([sys.executable, "-c", RISE_AND_REST], capture_output=True, text=True, check=True).stdout
    if "None" in printed:
        pytest.skip("this system's peak can't be set back")
    rise, rest = map(int, printed.split())
    assert 60 << 20 <= rise < 200 << 20
    assert rest < 8 << 20


def test_memory_of_a_process_and_what_it_started() -> None:
    child = "import sys; grown = b'x' * (32 << 20); print('ready', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    alone, tree = PeakMemory(process.pid), PeakMemory(process.pid, with_children=True)
    alone.start()
    tree.start()
    if (peak := tree.peak_bytes()) is not None:
        assert peak > (alone.peak_bytes() or 0) + (32 << 20)
        assert peak >= (tree.before_bytes or 0)
    process.stdin.close()
    process.wait(20)
    tree.start()
    assert (tree.before_bytes, tree.peak_bytes(), tree.rise_bytes()) == (None, None, None)
