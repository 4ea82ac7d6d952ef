"""The request parameters of the Sim-LLM contender."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, StrictBool


class SimLLMOptions(BaseModel):
    """`reuse` false neither searches for a similar task nor keeps this one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reuse: StrictBool = True
