"""The request parameters of the prefix contender."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, StrictBool


class PrefixOptions(BaseModel):
    """`use_cache` false computes every token's whole context anew; `use_prefix_cache` false keeps nothing between
    requests. Without a KV cache there is no prefix cache either.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    use_cache: StrictBool = True
    use_prefix_cache: StrictBool = True
