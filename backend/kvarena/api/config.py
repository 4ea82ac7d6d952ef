"""Settings of the HTTP server itself. What the engine needs is the engine's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvarena.api_key import API_KEY_VARIABLE


@dataclass(frozen=True)
class ApiConfig:
    """`api_key` None lets everybody in. Of all generations `max_running` run at once, each in a thread of its own; the
    others wait in the order of their arrival.
    """

    api_key: str | None = field(default=None, repr=False)
    max_body_bytes: int = 4 * 2**20
    max_running: int = 64
    max_choices: int = 128
    """Prompts times `n` of one request."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_running", "max_choices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ApiConfig:
        return cls(api_key=environment.get(API_KEY_VARIABLE) or None)
