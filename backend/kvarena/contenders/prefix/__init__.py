"""Exact reuse of shared prefixes: the KV and the last logits of every prefix that was seen."""
