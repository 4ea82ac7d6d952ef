"""The API key that the servers ask for and their clients show, as a bearer token. No key lets everybody in."""

from __future__ import annotations

API_KEY_VARIABLE = "KVARENA_API_KEY"


def bearer(api_key: str) -> dict[str, str]:
    """The headers that show a key; none for an empty one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
