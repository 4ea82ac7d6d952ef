"""A line to the contender with KV slots, in one of its modes; and its table of slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from chat_session import STATE_TIMEOUT_S, ChatSession
from errors import explained, http_error
from events import Event
from settings import Contender
from slots import SlotTable
from wire import Message, Sampling


class SlotSession(ChatSession):
    """A `ChatSession` that says in every request whether the slots are used, and whose conversation it is."""

    def __init__(self, contender: Contender, use_cache: bool, api_key: str = "", timeout_s: float = 600.0) -> None:
        super().__init__(contender, api_key, timeout_s)
        self._use_cache = use_cache

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, put: Callable[[Event], None], request_id: str
    ) -> Future[None]:
        """The two modes' conversations have names of their own, so that neither goes on with the other's turns; and so
        have their requests, which one server gets.
        """
        user = f"{sampling.user}-{self.contender.name}" if sampling.user else ""
        chosen = dataclasses.replace(sampling, use_cache=self._use_cache, user=user)
        return super().answer(messages, chosen, put, f"{request_id}-{self.contender.name}")

    def slots(self) -> Future[SlotTable]:
        """What lies in the slots now. Its result raises `ContenderError`."""
        return self._submit(self._slots())

    async def _slots(self) -> SlotTable:
        with explained(self.contender, STATE_TIMEOUT_S):
            reply = await self._http.get("/slots", timeout=STATE_TIMEOUT_S)
            if reply.is_error:
                raise http_error(self.contender, reply)
            return SlotTable.read(reply.json())
