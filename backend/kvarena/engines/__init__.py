"""Engines in plain PyTorch over Hugging Face models: each a contender, served by `kvarena.api`."""
