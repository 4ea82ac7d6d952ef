"""The Sim-LLM contender: similar tasks lend each other their KV."""
