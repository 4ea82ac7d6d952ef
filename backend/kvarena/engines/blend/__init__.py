"""Approximate reuse of chunks wherever they stand: the blend over a Hugging Face model's own forward."""
