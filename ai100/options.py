"""The request parameters of the AI 100 contender."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, StrictBool


class AI100Options(BaseModel):
    """`use_cache` false processes the topic's whole history anew, and keeps nothing of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    use_cache: StrictBool = True
