"""The middleware by its name in kvarena 0.1.0."""

from kvarena.engines.vllm.middleware import KVArenaMiddleware

__all__ = ["KVArenaMiddleware"]
