"""`simllm`: our PyTorch engine that reuses the KV of a similar earlier prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from kvarena.contenders.servers import EngineServer, Launch, Options, own_options
from kvarena.contenders.simllm.params import Mode
from kvarena.contenders.spec import ContenderSpec, setting
from kvarena.policies.params import PARAMETERS


@dataclass(frozen=True)
class SimLLMSettings:
    """`None` is the server's own default."""

    mode: Mode | None = setting(
        None,
        "What is reused of a similar earlier prompt: aligned (all layers, where the tokens are the same), "
        "top_layer (the last layer), or sandwich (the same, with more layers run).",
        shown="aligned",
    )
    similarity_threshold: Annotated[float, Interval(ge=-1, le=1)] | Literal["auto"] | None = setting(
        None,
        "Minimum cosine similarity of two similar prompts, from -1 to 1, or auto; docs/simllm.md says what prompts "
        "have.",
        shown=0.998,  # prompts over the same long texts are nearly all above the paper's 0.8
        demand="auto or a number from -1 to 1",
    )
    max_cache_size: Annotated[int, Ge(1)] | None = setting(
        None,
        "Number of prompts that are kept, each with its whole KV; the least recently used one goes first.",
        shown=100,
    )
    cache_gb: Annotated[float, Gt(0)] = setting(1.0, "Memory for their KV, in GiB.")
    num_hyperplanes: Annotated[int, Interval(ge=1, le=64)] | None = setting(
        None, "Bits of the hash by which they are found.", shown=16
    )


def _options(launch: Launch) -> Options:
    """Mode aligned blends as the contender blend does."""
    return {
        **own_options(launch),
        "--cache-gb": f"{launch.settings.cache_gb:g}",
        **{f"--{name.replace('_', '-')}": getattr(launch.blend, name) for name in PARAMETERS},
    }


SPEC = ContenderSpec(
    name="simllm",
    title="PyTorch + similar prompts (Sim-LLM)",
    explanation="Reuses the KV of a similar earlier prompt.",
    port=8003,
    server=EngineServer("kvarena.contenders.simllm", _options),
    is_approximate=True,
    report="similar_task",
    settings=SimLLMSettings,
    cache_gb=lambda launch: launch.settings.cache_gb if launch.profile == "cpu" else 0,
    model_types=("llama",),
)
