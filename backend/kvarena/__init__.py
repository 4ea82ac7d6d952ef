"""KV Arena: ways of reusing an LLM's KV cache, side by side."""

__version__ = "0.1.0"
