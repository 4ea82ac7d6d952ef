"""Signals while the stack is changed: any wish to end becomes one `KeyboardInterrupt`, and cleaning up goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does."""
    with _handled_by(_interrupt):
        yield


@contextmanager
def stop_signals_ignored() -> Iterator[None]:
    """The block runs to its end."""
    with _handled_by(signal.SIG_IGN):
        yield


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _handled_by(handler: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
