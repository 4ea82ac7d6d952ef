"""The connector by its name in kvarena 0.1.0."""

from kvarena.engines.vllm.connector import KVArenaConnector

__all__ = ["KVArenaConnector"]
