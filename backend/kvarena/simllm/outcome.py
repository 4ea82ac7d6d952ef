"""What reuse did for one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvarena.reuse.plan import TokenIds
from kvarena.simllm.threshold import AgreementSample


@dataclass(frozen=True)
class TaskOutcome:
    """`num_layer_passes` counts a prompt token once for each layer that ran over it: `T * L` without reuse.

    `num_prompt_tokens = num_reused_tokens + num_recomputed_tokens + num_computed_tokens`. In mode "top_layer" every
    token of a hit counts as reused: the earlier task's KV stands for what they would have been computed for.
    `matched_token_ids` are the earlier prompt's. `check` is there when reuse was tried beside a full prefill, to be
    compared with it; that counts as a miss.
    """

    task_id: str
    num_prompt_tokens: int
    num_layer_passes: int
    matched_task_id: str | None = None
    similarity: float | None = None
    is_approximate: bool = False
    num_reused_tokens: int = 0
    num_recomputed_tokens: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    matched_token_ids: TokenIds | None = field(default=None, compare=False)
    check: AgreementSample | None = None

    @property
    def is_hit(self) -> bool:
        return self.matched_task_id is not None

    @property
    def num_computed_tokens(self) -> int:
        return self.num_prompt_tokens - self.num_reused_tokens - self.num_recomputed_tokens
