"""Asks a service whether it is well: one short GET of its health address.

`python -m kvarena.stack.health URL` is the health check of a container: its exit status is 0 where that is healthy. It
runs every few seconds in each, so nothing large is imported here.
"""

from __future__ import annotations

import http.client
import sys
import urllib.parse
from typing import Literal

from kvarena.stack.service import Service

PROBE_TIMEOUT_S = 2.0

Health = Literal["healthy", "not ready", "silent"]


def probe(service: Service, timeout_s: float = PROBE_TIMEOUT_S) -> Health:
    return probe_url(service.health_url, timeout_s)


def probe_url(url: str, timeout_s: float = PROBE_TIMEOUT_S) -> Health:
    """healthy: the address answers with 200; silent: it takes the connection and doesn't answer in time; not
    ready: all else. Goes there directly, whatever proxies the environment names."""
    address = urllib.parse.urlsplit(url)
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


if __name__ == "__main__":
    sys.exit(probe_url(sys.argv[1]) != "healthy")
