"""The Sim-LLM contender: similar tasks lend each other their KV. `kvarena.simllm` has the public names."""
