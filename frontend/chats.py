"""The chats of this page process by key, so that a reloaded page finds its chat again.

The key is random and stands in the page's address (`?chat=...`). At most `MAX_CHATS` are kept, the longest unused one
goes first; a restart of the page forgets them all.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from history import Chat
from runs import Run

MAX_CHATS = 64


@dataclass
class OpenChat:
    """A chat and the question that is under way in it, if any."""

    chat: Chat = field(default_factory=Chat)
    run: Run | None = None

    @property
    def busy(self) -> bool:
        return self.run is not None

    def stop(self) -> None:
        """Ends the run; partial answers stay in the chat, marked as interrupted."""
        if self.run is not None:
            self.run.stop()
            self.run = None


class ChatStore:
    """Safe to use from several sessions at once. `make_chat` makes an empty chat."""

    def __init__(self, max_chats: int = MAX_CHATS, make_chat: Callable[[], Chat] = Chat) -> None:
        self._make_chat = make_chat
        self._max_chats = max_chats
        self._chats: OrderedDict[str, OpenChat] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> OpenChat | None:
        with self._lock:
            if key in self._chats:
                self._chats.move_to_end(key)
            return self._chats.get(key)

    def new(self) -> OpenChat:
        """An empty chat; the longest unused ones are stopped and forgotten to make room."""
        opened = OpenChat(self._make_chat())
        with self._lock:
            self._chats[opened.chat.key] = opened
            while len(self._chats) > self._max_chats:
                _, forgotten = self._chats.popitem(last=False)
                forgotten.stop()
        return opened
