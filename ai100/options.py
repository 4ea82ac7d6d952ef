"""The request parameters of the AI 100 contender."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, StrictBool


class AI100Options(BaseModel):
    """`use_cache` false processes the topic's whole history anew, and keeps nothing of it.

    `notes`: whether the server adds notes that fit the topic; left out, it does so for a client that sends neither a
    system message nor chunks of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    use_cache: StrictBool = True
    notes: StrictBool | None = None
