"""What a service of the stack is: plain data, the contract between the list of services and whatever runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HOST = "127.0.0.1"
LMCACHE_SERVER = "lmcache-server"
"""The service that keeps chunks; `lmcache` is a contender."""


@dataclass(frozen=True)
class Network:
    """How services find each other. `listen`: the address a server listens on. `by_name`: others reach a service at
    its own name, as containers do; otherwise at `HOST`."""

    listen: str = HOST
    by_name: bool = False

    def host(self, name: str) -> str:
        return name if self.by_name else HOST


LOOPBACK = Network()
BETWEEN_CONTAINERS = Network(listen="0.0.0.0", by_name=True)


@dataclass(frozen=True)
class Service:
    """One process of the stack. Plain data: `dataclasses.asdict` is what the record and other runners keep.

    `address` is where its users reach it, `health_url` where its own machine does. `environment` is added to the
    starter's own; no secret stands in it (`HF_TOKEN` comes with the starter's environment). `depends_on` names the
    services that must be healthy before this one is started. `cpus` are the logical CPUs all its threads stay on;
    empty: any. Times are in seconds.
    """

    name: str
    title: str
    command: tuple[str, ...]
    port: int
    address: str
    health_url: str
    log_path: str
    environment: Mapping[str, str]
    directory: str
    other_ports: tuple[int, ...] = ()
    depends_on: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0
