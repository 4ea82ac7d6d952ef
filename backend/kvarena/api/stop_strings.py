"""Stop strings in a text that arrives in pieces. What comes out doesn't depend on how the text was cut into pieces.

The stop string that is complete first ends the text, before it or (`include`) behind it; of several that are complete
with the same character, the one that was named first. An end of the text that could begin a stop string is held back.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain now; the last of it when `found` has become true."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        if (end := self._first_end()) is not None:
            self.found = True
            out, self._held = self._held[:end], ""
            return out
        return self._release(len(self._held) - self._num_held())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out

    def _first_end(self) -> int | None:
        """Where the text ends, if it holds a stop string."""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        end, start = min(found, key=lambda match: match[0])
        return end if self._include else start

    def _num_held(self) -> int:
        """The length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0
