"""What the page is told from outside: the contenders, the folders of chunks and of results, an API key.

The environment is read here and nowhere else in the frontend. Without any of the variables the page expects the
stack's default ports, the repository's `data/` and its `results/`.

    KVARENA_CONTENDERS   JSON list of {"name", "title", "url"}, and what else a contender's spec says: "explanation",
                         "approximate", "report", which is how its reports are shown, "icon" and
                         "public_url", where people reach it at another address than the page
    KVARENA_PUBLIC_URLS  JSON object of public URLs by a contender's name, which go before those
    KVARENA_SERVICES     JSON list of {"name", "title", "url"} of the LMCache servers behind them
    KVARENA_DATA_DIR     folder of documents
    KVARENA_CHUNK_TOKENS longer documents are split into chunks of at most so many tokens
    KVARENA_TOKENIZER    the model's folder, or its repository in a hub cache, whose tokenizer.json counts them
    KVARENA_RESULTS_DIR  folder of result files
    KVARENA_HOST_FOLDERS in a container, JSON object of its folders that are the host's, with the host's paths
    KVARENA_HOME         the stack's state folder, in which chats are kept
    KVARENA_NOTICE       what the stack wants said of what it serves
    KVARENA_SEPARATOR    between chunks, where no contender says what its own is
    KVARENA_API_KEY      sent to every contender as a bearer token
    KVARENA_TIMEOUT_S    longest silence of a server, in seconds
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from kvarena.client import API_KEY_VARIABLE, TIMEOUT_S
from kvarena.splitting import DEFAULT_CHUNK_TOKENS, MIN_CHUNK_TOKENS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DATA_DIR = ROOT / "data"
DEFAULT_RESULTS_DIR = ROOT / "results"
DEFAULT_HOME = ROOT / ".kvarena"
SHIPPED_RESULTS_DIR = ROOT / "docs" / "results"
DEFAULT_SEPARATOR = " # # "
REPORT_VIEWS = ("", "blend", "similar_task", "slots")
"""How the page can show what a contender reports of a request; the first: by the counts that all have."""


T = TypeVar("T", bound="DataclassInstance")


def read_fields(kind: type[T], told: Mapping[str, Any]) -> T:
    """A dataclass with what was told of its fields, by name; null stands for the default. Raises `KeyError` for a field
    that is missing.
    """
    required = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    optional = [one.name for one in fields(kind) if told.get(one.name) is not None]
    return kind(**{name: told[name] for name in {*required, *optional}})


@dataclass(frozen=True)
class Service:
    """A server of the stack. `name` identifies it (letters, digits, - and _), `title` is for people."""

    name: str
    title: str
    url: str

    def __post_init__(self) -> None:
        kind = type(self).__name__.lower()
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"a {kind}'s name is made of letters, digits, - and _, not {self.name!r}")
        if not re.match(r"https?://[^/]", self.url):
            raise ValueError(f"a {kind}'s url begins with http:// or https://, not {self.url!r}")

    @property
    def log_name(self) -> str:
        """The stack's name for it."""
        return self.name

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Self:
        """From an environment variable. Raises `ValueError`, `KeyError` and the like for another form."""
        return read_fields(
            cls, {name: value.rstrip("/") if name.endswith("url") else value for name, value in entry.items()}
        )


@dataclass(frozen=True)
class Contender(Service):
    """A server in the arena.

    `explanation` is one line on what it reuses. `report` is how its request reports are shown, and what its requests
    can choose; empty: by the counts that all have. `approximate` says what its answers are if no request report does.
    `service` is the stack's name for a server that is in the arena more than once. `public_url` is its address for
    people, if the page uses another. `icon` stands before its title.
    """

    explanation: str = ""
    approximate: bool = False
    report: str = ""
    service: str = ""
    public_url: str = ""
    icon: str = ""

    @property
    def address(self) -> str:
        """For people."""
        return self.public_url or self.url

    @property
    def log_name(self) -> str:
        return self.service or self.name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.report not in REPORT_VIEWS:
            raise ValueError(f"a contender's report is one of {REPORT_VIEWS}, not {self.report!r}")


# >>> default contenders: written by python -m kvarena.stack.generate
DEFAULT_CONTENDERS = (
    Contender(
        name="blend",
        title="vLLM with LMCache (CacheBlend)",
        explanation="Reuses the KV of text chunks anywhere in the prompt, and recomputes some of their tokens.",
        url="http://127.0.0.1:8000",
        approximate=True,
        report="blend",
        icon="🚀",
    ),
    Contender(
        name="plain",
        title="vLLM without LMCache",
        explanation="Computes the whole prompt except for prefixes in vLLM's own cache.",
        url="http://127.0.0.1:8001",
        approximate=False,
        report="",
        icon="🐢",
    ),
)
DEFAULT_SERVICES = (Service("lmcache-server", "LMCache server", "http://127.0.0.1:8080"),)
SLOTS_CONTENDER = "ai100"
# <<< default contenders


@dataclass(frozen=True)
class Settings:
    contenders: tuple[Contender, ...] = DEFAULT_CONTENDERS
    services: tuple[Service, ...] = DEFAULT_SERVICES
    data_dir: Path = DEFAULT_DATA_DIR
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    tokenizer: str = ""
    results_dir: Path = DEFAULT_RESULTS_DIR
    home: Path = DEFAULT_HOME
    host_folders: Mapping[Path, Path] = field(default_factory=dict)
    separator: str = DEFAULT_SEPARATOR
    notice: str = ""
    api_key: str = field(default="", repr=False)
    timeout_s: float = TIMEOUT_S

    @property
    def own_results_dir(self) -> Path:
        """The page's own folder, if it can't write into `results_dir`."""
        return self.home / "results"

    def on_the_host(self, path: Path) -> Path:
        """Where a terminal finds it; the same path unless the page runs in a container."""
        for folder, on_host in self.host_folders.items():
            if path.is_relative_to(folder):
                return on_host / path.relative_to(folder)
        return path


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Raises `ValueError` naming the variable and what it should hold."""
    contenders = environment.get("KVARENA_CONTENDERS", "")
    return Settings(
        contenders=_contenders(contenders, _texts("KVARENA_PUBLIC_URLS", environment)),
        services=_services(environment.get("KVARENA_SERVICES", ""), by_default=not contenders.strip()),
        data_dir=Path(environment.get("KVARENA_DATA_DIR") or DEFAULT_DATA_DIR),
        chunk_tokens=_chunk_tokens(environment.get("KVARENA_CHUNK_TOKENS", "")),
        tokenizer=environment.get("KVARENA_TOKENIZER", ""),
        results_dir=Path(environment.get("KVARENA_RESULTS_DIR") or DEFAULT_RESULTS_DIR),
        home=Path(environment.get("KVARENA_HOME") or DEFAULT_HOME).expanduser(),
        host_folders={
            Path(folder): Path(on_host) for folder, on_host in _texts("KVARENA_HOST_FOLDERS", environment).items()
        },
        separator=environment.get("KVARENA_SEPARATOR", DEFAULT_SEPARATOR),
        notice=environment.get("KVARENA_NOTICE", ""),
        api_key=environment.get(API_KEY_VARIABLE, ""),
        timeout_s=_seconds(environment.get("KVARENA_TIMEOUT_S", "")),
    )


def _contenders(text: str, public_urls: Mapping[str, str]) -> tuple[Contender, ...]:
    if not text.strip():
        return DEFAULT_CONTENDERS
    contenders = _servers("KVARENA_CONTENDERS", text, Contender)
    if not contenders:
        raise ValueError("KVARENA_CONTENDERS needs at least one contender")
    return tuple(replace(one, public_url=public_urls.get(one.name, one.public_url)) for one in contenders)


def _texts(variable: str, environment: Mapping[str, str]) -> dict[str, str]:
    """A JSON object."""
    text = environment.get(variable, "")
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise ValueError(f"{variable} must be a JSON object of texts: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{variable} must be a JSON object of texts, not {text!r}")
    return found


def _services(text: str, *, by_default: bool) -> tuple[Service, ...]:
    """The default ones go with the default contenders."""
    if not text.strip():
        return DEFAULT_SERVICES if by_default else ()
    return _servers("KVARENA_SERVICES", text, Service)


S = TypeVar("S", bound=Service)


def _servers(variable: str, text: str, kind: type[S]) -> tuple[S, ...]:
    try:
        servers = tuple(map(kind.read, json.loads(text)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{variable} must be a JSON list of {{"name", "title", "url"}}: {error}') from error
    names = [server.name for server in servers]
    if len(set(names)) < len(names):
        raise ValueError(f"{variable} needs each name once; got {names}")
    return servers


def _chunk_tokens(text: str) -> int:
    if not text.strip():
        return DEFAULT_CHUNK_TOKENS
    if not text.strip().isdecimal() or int(text) < MIN_CHUNK_TOKENS:
        raise ValueError(f"KVARENA_CHUNK_TOKENS must be a number of tokens from {MIN_CHUNK_TOKENS} on, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    if not text.strip():
        return TIMEOUT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"KVARENA_TIMEOUT_S must be a number of seconds above 0, not {text!r}")
    return seconds
