"""`prefix`: our PyTorch engine with an exact prefix cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from kvarena.contenders.servers import EngineServer, Launch, Options, own_options
from kvarena.contenders.spec import ContenderSpec, setting


@dataclass(frozen=True)
class PrefixSettings:
    cache_gb: Annotated[float, Ge(0)] = setting(1.0, "Memory for prefixes, in GiB; 0 keeps none.")
    storage: Literal["cpu", "device"] = setting(
        "cpu", "Where prefixes are kept: cpu (main memory), or device (beside the model)."
    )
    min_tokens: Annotated[int, Ge(1)] = setting(20, "Minimum length of a reused prefix, in tokens.")
    max_entries: Annotated[int, Ge(1)] | None = setting(
        None,
        "Maximum number of whole prefixes; without it memory is the only limit.",
        shown=16,
        default_text="default: no limit",
    )
    max_age_s: Annotated[float, Gt(0)] | None = setting(
        None,
        "Seconds until a prefix is dropped; without it none is too old, for KV doesn't go stale.",
        shown=1200,
        default_text="default: no limit",
    )


def _options(launch: Launch) -> Options:
    return {**own_options(launch), "--cache-gb": f"{launch.settings.cache_gb:g}"}


SPEC = ContenderSpec(
    name="prefix",
    title="PyTorch + prefix cache with logits",
    explanation="Reuses the KV and the last logits of any prefix that was seen before.",
    port=8002,
    server=EngineServer("kvarena.contenders.prefix", _options),
    settings=PrefixSettings,
    cache_gb=lambda launch: launch.settings.cache_gb if "cpu" in (launch.profile, launch.settings.storage) else 0,
)
