"""Becomes one service of the stack in a container of its own: `python -m kvarena.stack.serve NAME [OPTION ...]`.

The settings are the container's environment, with the keys of `.env.example`; `CONTENDERS` names the servers that share
the machine's cores or GPUs, and this one is always among them. The command is that of `build_services`, so containers
and processes can't differ; what comes after NAME is added to it. Secrets are files of `SECRETS_FOLDER`, which engines
don't show as they show variables.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from kvarena.contenders.spec import LMCACHE_SERVER
from kvarena.home import Home, StackError
from kvarena.stack.plan import Plan, make_plan
from kvarena.stack.preflight import check_model
from kvarena.stack.processes import become
from kvarena.stack.service import BETWEEN_CONTAINERS, Service
from kvarena.stack.services import TITLES, build_services
from kvarena.stack.settings import CONTENDERS, SPECS, load_settings

SECRETS_FOLDER = Path("/run/secrets")


def read_secrets(folder: Path) -> dict[str, str]:
    """The setting that each file is named for, as `hf_token`, by its variable. An empty file is no secret."""
    files = [path for path in sorted(folder.glob("*")) if path.is_file()]
    return {path.name.upper(): text for path in files if (text := path.read_text().strip())}


def service_of_this_container(name: str, home: Home) -> Service:
    """Raises `StackError` for bad settings and for a name that no service has."""
    return next(service for service in build_services(plan_of(name, home), home) if service.name == name)


def plan_of(name: str, home: Home) -> Plan:
    """The same, of the stack that the service is in."""
    if name not in TITLES:
        raise StackError(f"no service {name!r}; choose one of {', '.join(TITLES)}")
    settings = load_settings(ui=True)
    contender = next(known for known in CONTENDERS if SPECS[known].has_chunk_cache) if name == LMCACHE_SERVER else name
    contenders = tuple(known for known in CONTENDERS if known == contender or known in settings.contenders)
    return make_plan(settings.model_copy(update={"contenders": contenders}), home, BETWEEN_CONTAINERS)


def main() -> None:
    name, *more_options = sys.argv[1:]
    home = Home.find()
    home.create()
    os.environ.update(read_secrets(SECRETS_FOLDER))
    try:
        service = service_of_this_container(name, home)
        check_model(plan_of(name, home), [service], os.environ.get("HF_TOKEN"))
        os.environ.update(load_settings().secrets)  # by the names that servers know them by
    except StackError as error:
        sys.exit(f"error: {error}")
    become(dataclasses.replace(service, command=(*service.command, *more_options)))


if __name__ == "__main__":
    main()
