"""Asks a service whether it is well: one short GET of its health address."""

from __future__ import annotations

import http.client
import urllib.parse
from typing import Literal

from kvarena.stack.service import Service

PROBE_TIMEOUT_S = 2.0

Health = Literal["healthy", "not ready", "silent"]


def probe(service: Service, timeout_s: float = PROBE_TIMEOUT_S) -> Health:
    """healthy: its health address answers with 200; silent: it takes the connection and doesn't answer in time; not
    ready: all else. Goes there directly, whatever proxies the environment names."""
    address = urllib.parse.urlsplit(service.health_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)
    try:
        connection.request("GET", address.path)
        return "healthy" if connection.getresponse().status == 200 else "not ready"
    except TimeoutError:
        return "silent"
    except (OSError, http.client.HTTPException):
        return "not ready"
    finally:
        connection.close()
