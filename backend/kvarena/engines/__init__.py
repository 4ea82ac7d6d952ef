"""What computes: the contract between a server and its engine, and the adapters of the blend to vLLM and to PyTorch."""
