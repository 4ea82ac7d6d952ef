"""What a contender is (`ContenderSpec`), and which there are (`contender_specs`).

A contender is one file of this folder, or one folder with a `spec.py`, that has a `SPEC`. It is found by that: choices,
ports, keys of `.env`, services, containers, Prometheus targets and the page's panes follow from the spec. Nothing here
and no spec imports torch, vllm or a server.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

import kvarena.contenders
from kvarena.contenders.servers import Launch, Server, VLLMServer

FIRST_PORT, LAST_PORT = 8000, 8500
"""Of contenders; the page and the services come after."""
PAGE = "page"
LMCACHE_SERVER = "lmcache-server"
"""The service that keeps chunks; `lmcache` is a contender."""
STARTED_BY_DEFAULT = ("blend", "plain")

ComposeProfile = Literal["cpu", "gpu"]
ReportView = Literal["", "blend", "similar_task", "slots"]
"""How the page shows what a contender reports of a request beside the counts, and what it lets one choose."""


def setting(
    default: Any,
    text: str,
    *,
    shown: object = None,
    short: str = "",
    default_text: str = "",
    in_env: str = "",
    demand: str = "",
) -> Any:
    """A field of a contender's settings: a key of `.env`, and an option of its server's command line.

    `text` explains both, `in_env` goes on in `.env.example`. If the default is `None`, the server's own is `shown`,
    which its program gets; with a `default_text` that is an example, and the program gets `None`. `short` is the
    option's second name. `demand` says what a value must be, where the type's own message doesn't.
    """
    example = default if default is not None else shown
    told = {"short": short, "default_text": default_text, "in_env": in_env, "demand": demand}
    return field(default=default, metadata={"text": text, "shown": example, **told})


@dataclass(frozen=True)
class Setting:
    """One of a contender's settings: `key` is that of the environment and of `.env`, in lower case."""

    key: str
    name: str
    annotation: Any
    default: Any
    text: str
    shown: object
    short: str
    default_text: str
    in_env: str
    demand: str


@dataclass(frozen=True)
class Container:
    """How `compose.yaml` runs the contender.

    `image`: `cpu` has vLLM, `engines` PyTorch alone. In its `profiles` it runs by default; in those of `optional_in`
    only if it is asked for. `mounts` are of the file's `x-mounts`, `environment` comes on top of the settings.
    """

    image: Literal["cpu", "engines"] = "engines"
    profiles: tuple[ComposeProfile, ...] = ("cpu",)
    optional_in: tuple[ComposeProfile, ...] = ()
    mounts: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    shm_size: str = ""


@dataclass(frozen=True)
class ContenderSpec:
    """A server in the arena.

    `name` is what users type, `title` what they read, `explanation` one line on what it reuses. `port` is that without
    `PORT_BASE`, with which it is as far from it as from `FIRST_PORT`. `settings` is a frozen dataclass of `setting`s:
    `cache_gb` of `prefix` is the key `PREFIX_CACHE_GB`. `needs` are the services it depends on, `packages` what must be
    installed beside what its kind of server needs. `cache_gb` is the main memory that KV of earlier requests may take,
    `chunk_store_gb` that of chunks. `on_card`: it runs on a card of its own, and has no share of cores or GPUs.
    `model_types` are those that it can serve; none: any. `report` says how the page shows its report, `icon` stands
    before its title there.

    Raises `ValueError` for a name, a port or a setting that can't be one.
    """

    name: str
    title: str
    explanation: str
    port: int
    server: Server
    is_approximate: bool = False
    report: ReportView = ""
    icon: str = ""
    settings: type | None = None
    needs: Callable[[Launch], tuple[str, ...]] = lambda launch: ()
    packages: Callable[[Launch], Mapping[str, str]] = lambda launch: {}
    cache_gb: Callable[[Launch], float] = lambda launch: 0
    chunk_store_gb: Callable[[Launch], float] = lambda launch: 0
    on_card: Callable[[Launch], bool] = lambda launch: False
    model_types: tuple[str, ...] = ()
    health_path: str = "/health"
    container: Container = Container()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]*", self.name):
            raise ValueError(f"a contender's name is made of small letters and digits, not {self.name!r}")
        if self.name == PAGE:
            raise ValueError(f"a contender can't be called {PAGE}: that is a service of the stack")
        if not FIRST_PORT <= self.port <= LAST_PORT:
            raise ValueError(f"{self.name}: its port is from {FIRST_PORT} to {LAST_PORT}, not {self.port}")
        for one in fields(self.settings) if self.settings else ():
            if "text" not in one.metadata:
                raise ValueError(f"{self.name}: declare {one.name} with setting(...)")

    @property
    def is_vllm(self) -> bool:
        return isinstance(self.server, VLLMServer)

    @property
    def has_chunk_cache(self) -> bool:
        """It keeps the KV of chunks, which can be computed before they are asked about."""
        return self.report == "blend"

    def own_settings(self) -> Iterator[Setting]:
        if self.settings is None:
            return
        annotations = get_type_hints(self.settings, include_extras=True)
        own: tuple[Field[Any], ...] = fields(self.settings)
        for one in own:
            yield Setting(f"{self.name}_{one.name}", one.name, annotations[one.name], one.default, **one.metadata)

    def filled(self, settings: Any) -> Any:
        """These settings of it, with the server's own default in place of each `None` that stands for one."""
        unset = (own for own in self.own_settings() if getattr(settings, own.name) is None and not own.default_text)
        return replace(settings, **{own.name: own.shown for own in unset})

    def page_entry(self, url: str) -> dict[str, object]:
        """What the page is told of it."""
        return {
            "name": self.name,
            "title": self.title,
            "explanation": self.explanation,
            "url": url,
            "approximate": self.is_approximate,
            "report": self.report,
            "icon": self.icon,
        }


@cache
def contender_specs() -> Mapping[str, ContenderSpec]:
    """Every contender by its name, in the order of their ports. Raises `ValueError` for two with one name or port."""
    found: dict[str, ContenderSpec] = {}
    ports: dict[int, str] = {}
    for spec in sorted(_specs(), key=lambda spec: (spec.port, spec.name)):
        if spec.name in found:
            raise ValueError(f"two contenders are called {spec.name}")
        if other := ports.get(spec.port):
            raise ValueError(f"the contenders {other} and {spec.name} have one port, {spec.port}")
        found[spec.name], ports[spec.port] = spec, spec.name
    return MappingProxyType(found)


def _specs() -> Iterator[ContenderSpec]:
    for module in pkgutil.iter_modules(kvarena.contenders.__path__, "kvarena.contenders."):
        name = f"{module.name}.spec" if module.ispkg else module.name
        if importlib.util.find_spec(name) is not None:
            spec = getattr(importlib.import_module(name), "SPEC", None)
            if isinstance(spec, ContenderSpec):
                yield spec
            elif module.ispkg:
                raise ValueError(f"{name} has no SPEC, the ContenderSpec of its contender")
