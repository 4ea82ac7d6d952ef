"""`plain`: vLLM as it is, which every other contender is measured against."""

from __future__ import annotations

from kvarena.contenders.servers import Launch, VLLMServer
from kvarena.contenders.spec import Container, ContenderSpec


def prefix_caching(launch: Launch) -> list[str]:
    """vLLM's own prefix cache, on or off."""
    return ["--enable-prefix-caching" if launch.prefix_caching else "--no-enable-prefix-caching"]


SPEC = ContenderSpec(
    name="plain",
    title="vLLM without LMCache",
    icon="🐢",
    explanation="Computes the whole prompt except for prefixes in vLLM's own cache.",
    port=8001,
    server=VLLMServer(prefix_caching),
    container=Container(image="cpu", profiles=("cpu", "gpu"), shm_size="1g"),
)
