"""Hugging Face models in plain PyTorch: one sequence at a time, and the blend over the model's own forward."""
