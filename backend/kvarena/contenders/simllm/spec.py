"""`simllm`: our PyTorch engine that reuses the KV of a similar earlier prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from kvarena.contenders.servers import EngineServer, Launch, Options, own_options
from kvarena.contenders.simllm.params import Mode
from kvarena.contenders.spec import ContenderSpec, setting
from kvarena.policies.params import PARAMETERS


@dataclass(frozen=True)
class SimLLMSettings:
    """`None` is the server's own default."""

    mode: Mode | None = setting(
        None,
        "What a similar earlier prompt lends: aligned (all layers, where the tokens are the same), or top_layer (the "
        "last layer).",
        shown="aligned",
    )
    similarity_threshold: Annotated[float, Interval(ge=-1, le=1)] | Literal["auto"] | None = setting(
        None,
        "The least cosine of two prompts that are similar, from -1 to 1, or auto; docs/simllm.md says what prompts "
        "have.",
        shown=0.998,
        demand="auto or a number from -1 to 1",
    )
    max_cache_size: Annotated[int, Ge(1)] | None = setting(
        None, "How many prompts are kept, each with its whole KV; the longest unused one goes first.", shown=100
    )
    num_hyperplanes: Annotated[int, Interval(ge=1, le=64)] | None = setting(
        None, "Bits of the hash by which they are found.", shown=16
    )


def _options(launch: Launch) -> Options:
    """Mode aligned blends as the contender blend does."""
    return {
        **own_options(launch),
        **{f"--{name.replace('_', '-')}": getattr(launch.blend, name) for name in PARAMETERS},
        "--max-model-len": launch.max_model_len,
    }


SPEC = ContenderSpec(
    name="simllm",
    title="PyTorch with Sim-LLM",
    explanation="Reuses the KV of a similar earlier prompt.",
    port=8003,
    server=EngineServer("kvarena.contenders.simllm", _options),
    is_approximate=True,
    report="similar_task",
    settings=SimLLMSettings,
    model_types=("llama",),
)
