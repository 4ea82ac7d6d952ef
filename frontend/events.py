"""What the worker tells the page about an answer, in this order: FirstToken and Text, then Done or Failed."""

from __future__ import annotations

from dataclasses import dataclass

from figures import Figures


@dataclass(frozen=True)
class FirstToken:
    """The first token is there: `first_token_ms` after the request was sent."""

    first_token_ms: float


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Done:
    """`finish_reason` is the server's: `stop`, `length` and so on."""

    figures: Figures
    finish_reason: str


@dataclass(frozen=True)
class Failed:
    message: str


Event = FirstToken | Text | Done | Failed
