"""What the stack raises for the person at the command line: a message to show, and the exit status."""

from __future__ import annotations


class StackError(Exception):
    """The command can't go on. `str(error)` is the whole message, and says what to do."""

    exit_code = 1


class ServiceFailedError(StackError):
    """A service died or wasn't healthy in time while it was started; carries the end of its log, and the first
    exception there, which is often the cause of the last."""

    def __init__(self, name: str, reason: str, *, cause: str, log_tail: str, log_path: str) -> None:
        super().__init__(f"{name} {reason}{f': {cause}' if cause else ''}")
        self.name = name
        self.log_tail = log_tail
        self.log_path = log_path
