"""What an instance runs, written down when it is started: the services, the folder of their sockets, the data folder.

status, logs, restart, warm and down go by this record and not by today's settings, so that they speak of what really
runs. It holds no secrets.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvarena.home import Home
from kvarena.splitting import DEFAULT_CHUNK_TOKENS, Splitter, find_splitter
from kvarena.stack.service import Service

TUPLE_FIELDS = ("command", "other_ports", "depends_on", "cpus")


@dataclass(frozen=True)
class Record:
    services: tuple[Service, ...]
    run_folder: str
    data_dir: str
    served_model: str
    has_api_key: bool = False
    notice: str = ""
    """What a user should know of what runs."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    tokenizer_place: str = ""
    """What counts them; empty where the size is estimated."""
    compose: tuple[str, ...] = ()
    """Where the services are containers, the `docker compose` command that is about them, with its options."""
    containers: Mapping[str, str] = field(default_factory=dict)
    """The names of those, by service."""

    @property
    def socket_path(self) -> Path:
        """Where supervisord listens."""
        return Path(self.run_folder) / "supervisor.sock"

    @property
    def splitter(self) -> Splitter:
        """Cuts documents as this stack's page does."""
        return find_splitter(self.tokenizer_place, self.chunk_tokens)

    def service(self, name: str) -> Service | None:
        return next((service for service in self.services if service.name == name), None)

    def write(self, home: Home) -> None:
        temporary = home.record.with_suffix(".new")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        temporary.replace(home.record)


def read_record(home: Home) -> Record | None:
    """`None` when nothing was started, or when the file is of another version of this project."""
    try:
        fields = json.loads(home.record.read_text())
        services = tuple(
            Service(**entry | {name: tuple(entry[name]) for name in TUPLE_FIELDS}) for entry in fields.pop("services")
        )
        return Record(services=services, **fields | {"compose": tuple(fields["compose"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def differences(running: Record, wanted: Record) -> list[str]:
    """In words, what a stack that runs has otherwise than one that is asked for; empty when they are the same."""
    lines = []
    for name in dict.fromkeys(service.name for service in (*running.services, *wanted.services)):
        old, new = running.service(name), wanted.service(name)
        if old is None or new is None:
            lines.append(f"{name} {'is not running' if old is None else 'is running and was not asked for'}")
        elif old != new:
            changes = _changed_values(command_options(old), command_options(new))
            changes += _changed_values(old.environment, new.environment)
            lines += [f"{name}: {change}" for change in changes or ["started in another way"]]
    if running.data_dir != wanted.data_dir:
        lines.append(f"data folder {running.data_dir}, not {wanted.data_dir}")
    if running.chunk_tokens != wanted.chunk_tokens:
        lines.append(f"CHUNK_TOKENS is {running.chunk_tokens}, not {wanted.chunk_tokens}")
    if running.has_api_key != wanted.has_api_key:
        lines.append(f"KVARENA_API_KEY is {'set' if running.has_api_key else 'not set'} for what runs")
    return lines


def _changed_values(before: Mapping[str, Any], after: Mapping[str, Any], within: str = "") -> list[str]:
    """The keys whose values differ; of two JSON objects those in them, after a dot as vLLM's command line has them."""
    changes = []
    for key in dict.fromkeys([*before, *after]):
        old, new = _parsed(before.get(key, "not set")), _parsed(after.get(key, "left out"))
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changed_values(old, new, f"{within}{key}.")
        elif old != new:
            changes.append(f"{within}{key} is {_as_text(old)}, not {_as_text(new)}")
    return changes


def _parsed(value: Any) -> Any:
    """The object that a text holds as JSON; anything else as it is."""
    try:
        found = json.loads(value)
    except (TypeError, ValueError):
        return value
    return found if isinstance(found, dict) else value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def command_options(service: Service) -> dict[str, str]:
    """`--key value` pairs of a command; the words before them under `command`."""
    options: dict[str, str] = {}
    key = "command"
    for word in service.command:
        if word.startswith("--"):
            key = word
            options[key] = ""
        else:
            options[key] = f"{options.get(key, '')} {word}".strip()
    return options
