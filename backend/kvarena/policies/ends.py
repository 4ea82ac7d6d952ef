"""`none` and `all`: the two ends of every policy."""

from kvarena.core.policy import RecomputeAll, RecomputeNone
from kvarena.policies.registry import policy

policy("none")(RecomputeNone)
policy("all")(RecomputeAll)
