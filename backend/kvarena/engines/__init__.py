"""The blend's adapters: inside vLLM, and over Hugging Face models in plain PyTorch."""
