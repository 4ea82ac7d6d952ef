"""The request parameters of the Sim-LLM contender."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from kvarena.simllm.params import Mode

Similarity = Annotated[float, Field(strict=True, ge=-1, le=1, allow_inf_nan=False)]


class SimLLMOptions(BaseModel):
    """`reuse` false neither searches for a similar task nor keeps this one. None is the server's own setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reuse: StrictBool = True
    mode: Mode | None = None
    similarity_threshold: Similarity | None = None
