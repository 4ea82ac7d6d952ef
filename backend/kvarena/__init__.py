"""KV Arena: ways of reusing an LLM's KV cache, side by side."""

from importlib.metadata import version

__version__ = version("kvarena")
