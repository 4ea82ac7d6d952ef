"""Which reused tokens to recompute: published policies, one class each, behind one seam."""

from kvarena.reuse.selection.policy import Evidence, Selection, SelectionPolicy, reused_positions
from kvarena.reuse.selection.registry import make_policy

__all__ = ["Evidence", "Selection", "SelectionPolicy", "make_policy", "reused_positions"]
