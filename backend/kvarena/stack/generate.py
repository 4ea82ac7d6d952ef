"""Writes out what follows from the contenders' specs and the policies' dataclasses:
`python -m kvarena.stack.generate`.

Sections of `.env.example`, the compose files, `containers/try.sh`, the page's settings and Prometheus's targets stand
between two comments that name them, and are replaced; what is around them is written by hand. A fast test checks that
they are current.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from kvarena.contenders.servers import Launch
from kvarena.contenders.spec import LMCACHE_SERVER, STARTED_BY_DEFAULT, ComposeProfile, ContenderSpec
from kvarena.home import project_root
from kvarena.policies.params import OPTIONS, PARAMETERS, POLICY, REGISTRY
from kvarena.policies.registry import summary_of
from kvarena.stack.containers import compose_service, contenders_of, optional_profile
from kvarena.stack.service import HOST
from kvarena.stack.services import TITLES
from kvarena.stack.settings import BLEND_PREFIX, DEFAULT_PORTS, PORT_OFFSETS, SPECS

LINE_LENGTH = 120
COMMAND = "python -m kvarena.stack.generate"
PORT_KEYS = {"page": "UI_PORT"}
Lines = Iterator[str]


@dataclass(frozen=True)
class Section:
    """The lines of a file between `# >>> NAME` and `# <<< NAME`; they are indented as these are."""

    path: str
    name: str
    lines: Callable[[], Lines]

    def in_text(self, text: str) -> str:
        """The file's text with this section anew. Raises `ValueError` where its comments are missing."""
        lines = text.splitlines()
        begin = next((at for at, line in enumerate(lines) if line.strip().startswith(f"# >>> {self.name}:")), None)
        end = next((at for at, line in enumerate(lines) if line.strip() == f"# <<< {self.name}"), None)
        if begin is None or end is None or end < begin:
            raise ValueError(f"{self.path} has no section between '# >>> {self.name}: ...' and '# <<< {self.name}'")
        indent = lines[begin][: lines[begin].index("#")]
        new = [f"# >>> {self.name}: written by {COMMAND}", *self.lines(), f"# <<< {self.name}"]
        lines[begin : end + 1] = [f"{indent}{line}" if line else "" for line in new]
        return "\n".join(lines) + "\n"


# --- .env.example ---


def env_choices() -> Lines:
    titles = ", ".join(f"{spec.name} ({spec.title})" for spec in SPECS.values())
    yield from comment(f"Which servers, separated by commas: {titles}. They share the cores, or the GPUs, equally.")
    yield f"#CONTENDERS={','.join(STARTED_BY_DEFAULT)}"


def env_ports() -> Lines:
    offsets = {name: PORT_OFFSETS[name] for name in (*SPECS, "page")}
    each = ", ".join(f"{name} N+{offset}" if offset else f"{name} N" for name, offset in offsets.items())
    yield from comment(
        f"One number for all: {each}, the LMCache server N+{PORT_OFFSETS['lmcache_server']} (requests) and "
        f"N+{PORT_OFFSETS['lmcache_http']} (HTTP)."
    )
    yield from comment("A port that is named below keeps its own number, except with --port-base on the command line.")
    yield "#PORT_BASE="
    for name, port in DEFAULT_PORTS.items():
        yield f"#{PORT_KEYS.get(name, f'{name.upper()}_PORT')}={port}"


def env_settings() -> Lines:
    with_settings = [spec for spec in SPECS.values() if spec.settings]
    for spec in with_settings:
        models = f", for models of type {' or '.join(spec.model_types)}" if spec.model_types else ""
        yield f"# --- The contender {spec.name}{models}; docs/{spec.name}.md says more ---"
        for own in spec.own_settings():
            yield from comment(f"{own.text} {own.in_env}")
            shown = f"{own.shown:g}" if isinstance(own.shown, float) else "" if own.shown is None else own.shown
            yield f"#{own.key.upper()}={shown}"
        if spec is not with_settings[-1]:
            yield ""


def comment(text: str) -> Lines:
    return (f"# {line}" for line in textwrap.wrap(text, LINE_LENGTH - 2, break_on_hyphens=False))


# --- compose.yaml ---


def compose_settings() -> Lines:
    """Files aren't handed on: they are mounted, under other names."""
    for spec in SPECS.values():
        for own in spec.own_settings():
            if Path not in get_args(own.annotation):
                yield f"{own.key.upper()}:"


def compose_choices(profile: ComposeProfile) -> Lines:
    by_default = [name for name in contenders_of(profile) if not optional_profile(name, profile)]
    yield f"CONTENDERS: ${{CONTENDERS:-{','.join(by_default)}}}"


def compose_templates() -> Lines:
    """What a contender's containers have in common, whatever the profile."""
    for index, spec in enumerate(SPECS.values()):
        if index:
            yield ""
        yield from _template(spec)


def _template(spec: ContenderSpec) -> Lines:
    own, shares_memory = spec.container, LMCACHE_SERVER in spec.needs(Launch())
    yield f"x-{spec.name}: &{spec.name}"
    yield f"  <<: *{'shares-memory' if shares_memory else 'server'}"
    yield f"  container_name: kvarena-{spec.name}"
    yield f"  command: [{spec.name}]"
    yield f'  ports: ["127.0.0.1:${{{spec.name.upper()}_PORT:-{spec.port}}}:{spec.port}"]'
    if own.shm_size:
        yield f"  shm_size: {own.shm_size}"
    if own.mounts:
        yield "  volumes:"
        names = ["state", "huggingface", "models", *own.mounts, *(["shared-memory"] if shares_memory else [])]
        yield from (f"    - *{name}" for name in names)
    yield f"  healthcheck: &{spec.name}-healthcheck"
    yield "    <<: *healthcheck"
    yield f'    test: [CMD, python3, -m, kvarena.stack.health, "http://127.0.0.1:{spec.port}{spec.health_path}"]'


def compose_public_urls() -> Lines:
    """Where people reach the contenders, as JSON over several lines."""
    urls = [f'"{name}": "http://{HOST}:${{{name.upper()}_PORT:-{spec.port}}}"' for name, spec in SPECS.items()]
    yield "KVARENA_PUBLIC_URLS: >-"
    yield f"  {{{urls[0]},"
    yield from (f"  {url}," for url in urls[1:-1])
    yield f"  {urls[-1]}}}"


def compose_services(profile: ComposeProfile) -> Lines:
    server, names = compose_service(LMCACHE_SERVER, profile), contenders_of(profile)
    asking = [name for name in names if LMCACHE_SERVER in SPECS[name].needs(Launch())]
    yield f"{server}:"
    yield from _of_profile(LMCACHE_SERVER, "cpu", [optional_profile(n, profile) or profile for n in asking], profile)
    for name in names:
        spec = SPECS[name]
        yield ""
        yield f"{compose_service(name, profile)}:"
        yield from _of_profile(name, spec.container.image, [optional_profile(name, profile) or profile], profile)
        if name in asking:
            yield "  depends_on:"
            yield f"    {server}: {{condition: service_healthy}}"
        if profile == "gpu":  # a first start downloads the model
            yield f"  healthcheck: {{<<: *{name}-healthcheck, start_period: 2h}}"
        if spec.container.environment:
            yield "  environment:"
            yield f"    <<: *{profile}-settings"
            yield from (f"    {key}: {value}" for key, value in spec.container.environment.items())


def _of_profile(name: str, image: str, profiles: list[str], profile: ComposeProfile) -> Lines:
    """Images for GPUs come first, for they have a memory limit of their own."""
    yield f"  <<: [*gpu-image, *{name}]" if profile == "gpu" else f"  <<: [*{name}, *{image}-image]"
    yield f"  profiles: [{', '.join(dict.fromkeys(profiles))}]"
    if profile == "gpu":
        yield f"  networks: {{default: {{aliases: [{name}]}}}}"


def gpu_share_services() -> Lines:
    """Each starts after those before it that run."""
    names = [compose_service(name, "gpu") for name in contenders_of("gpu")]
    for index, name in enumerate(names):
        if not index:
            yield f"{name}: &share"
            yield '  environment: {GPU_SHARE: "${GPU_SHARE:-true}"}'
        else:
            yield ""
            yield f"{name}:"
            yield "  <<: *share"
            yield "  depends_on:"
            yield from (f"    {before}: {{condition: service_healthy, required: false}}" for before in names[:index])


# --- Prometheus ---


def targets(by_name: bool) -> Lines:
    for spec in SPECS.values():
        yield f'- targets: ["{spec.name if by_name else "127.0.0.1"}:{spec.port}"]'
        yield f"  labels: {{contender: {spec.name}}}"


# --- Policies ---


def env_policies() -> Lines:
    """Each parameter with the policies that have it, unless those are all that have any."""
    with_parameters = [name for name, own in OPTIONS.items() if own]
    for name, own in PARAMETERS.items():
        having = [policy for policy in with_parameters if name in OPTIONS[policy]]
        if own is POLICY:
            yield from comment(f"{own.help} One of:")
            yield from (f"#   {policy}: {summary_of(cls)}" for policy, cls in REGISTRY.items())
        else:
            whose = "" if having == with_parameters else f"{', '.join(having)}: "
            yield from comment(whose + own.help_with_values)
        yield f"#{BLEND_PREFIX.upper()}{name.upper()}={own.default}"


def compose_policies() -> Lines:
    return (f"{BLEND_PREFIX.upper()}{name.upper()}:" for name in PARAMETERS)


# --- containers/try.sh ---


def tried_services() -> Lines:
    """Which services the images have, and what comes after `PORT_BASE` in the address of their health."""
    images: dict[str, list[str]] = {}
    for spec in SPECS.values():
        images.setdefault(spec.container.image, []).append(spec.name)
    yield f"contenders={','.join(SPECS)}"
    yield "declare -A services=("
    yield from (f'    [{image}]="{" ".join(names)}"' for image, names in images.items())
    yield ")"
    yield "declare -A health=("
    yield from (f"    [{spec.name}]={PORT_OFFSETS[spec.name]}{spec.health_path}" for spec in SPECS.values())
    yield ")"


# --- frontend/settings.py ---


def page_defaults() -> Lines:
    """What the page expects where nobody tells it; and of the contenders with slots the first, which it says how to
    start.
    """
    yield "DEFAULT_CONTENDERS = ("
    for spec in map(SPECS.__getitem__, STARTED_BY_DEFAULT):
        yield "    Contender("
        for key, value in spec.page_entry(f"http://127.0.0.1:{spec.port}").items():
            yield f"        {key}={json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value},"
        yield "    ),"
    yield ")"
    address = f"http://127.0.0.1:{DEFAULT_PORTS['lmcache_http']}"
    yield f'DEFAULT_SERVICES = (Service("{LMCACHE_SERVER}", "{TITLES[LMCACHE_SERVER]}", "{address}"),)'
    slots = [spec.name for spec in SPECS.values() if spec.report == "slots"]
    yield f'SLOTS_CONTENDER = "{slots[0]}"'


SECTIONS = (
    Section(".env.example", "choices of contenders", env_choices),
    Section(".env.example", "ports", env_ports),
    Section(".env.example", "settings of contenders", env_settings),
    Section("compose.yaml", "settings of contenders", compose_settings),
    Section("compose.yaml", "contenders of cpu", lambda: compose_choices("cpu")),
    Section("compose.yaml", "contenders of gpu", lambda: compose_choices("gpu")),
    Section("compose.yaml", "contenders", compose_templates),
    Section("compose.yaml", "services of cpu", lambda: compose_services("cpu")),
    Section("compose.yaml", "services of gpu", lambda: compose_services("gpu")),
    Section("compose.yaml", "public addresses", compose_public_urls),
    Section(".env.example", "policies", env_policies),
    Section("compose.yaml", "policies", compose_policies),
    Section("compose.gpu-share.yaml", "services", gpu_share_services),
    Section("containers/try.sh", "contenders", tried_services),
    Section("frontend/settings.py", "default contenders", page_defaults),
    Section("observability/targets.yml", "contenders", lambda: targets(by_name=False)),
    Section("observability/targets.containers.yml", "contenders", lambda: targets(by_name=True)),
)


def generated(root: Path) -> dict[Path, str]:
    """What each file with sections shall hold."""
    texts: dict[Path, str] = {}
    for section in SECTIONS:
        path = root / section.path
        texts[path] = section.in_text(texts[path] if path in texts else path.read_text())
    return texts


def main() -> None:
    """Writes the files that aren't current, and names them."""
    for path, text in generated(project_root()).items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
