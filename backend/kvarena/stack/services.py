"""The services of the stack, as data: what each is, how it is started, and how its health is asked.

`build_services` is the one list: the LMCache server, the contenders as their specs say, the page. It starts nothing and
looks at nothing but its arguments, so that whatever runs the services, a supervisor of processes or containers, takes
them from it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from kvarena.contenders.lmcache import LMCACHE_CHUNK_TOKENS
from kvarena.contenders.servers import COMMON_ENVIRONMENT
from kvarena.contenders.spec import LMCACHE_SERVER, ContenderSpec
from kvarena.home import Home, StackError, project_root
from kvarena.stack.lmcache_l2 import L2_OPTION
from kvarena.stack.plan import Plan
from kvarena.stack.record import Record
from kvarena.stack.service import HOST, Service
from kvarena.stack.settings import SPECS

TITLES = {
    LMCACHE_SERVER: "LMCache server",
    **{name: spec.title for name, spec in SPECS.items()},
    "page": "the page",
}


def build_services(plan: Plan, home: Home) -> list[Service]:
    """Every service of this plan, each after those it depends on."""
    services = []
    if plan.needs_lmcache:
        services.append(_lmcache_server(plan, home))
    services += [_contender(spec, plan, home) for spec in plan.specs]
    if plan.page:
        services.append(_page(plan, home))
    return services


def record_of(plan: Plan, services: Iterable[Service], has_api_key: bool, **containers: Any) -> Record:
    """What is written down of a stack that isn't started yet. `containers` are its fields about those."""
    return Record(
        services=tuple(services),
        run_folder="",
        data_dir=str(plan.data_dir),
        served_model=plan.model.served_name,
        has_api_key=has_api_key,
        notice=plan.notice,
        chunk_tokens=plan.chunk_tokens,
        tokenizer_place=plan.tokenizer_place,
        **containers,
    )


def _lmcache_server(plan: Plan, home: Home) -> Service:
    ports = plan.ports
    command = [sys.executable, "-m", "lmcache.cli.main", "server"]
    command += ["--host", plan.network.listen, "--port", str(ports["lmcache_server"])]
    command += ["--http-host", plan.network.listen, "--http-port", str(ports["lmcache_http"])]
    command += ["--l1-size-gb", f"{plan.lmcache_gb:g}", "--eviction-policy", "LRU"]
    command += ["--chunk-size", str(LMCACHE_CHUNK_TOKENS), "--supported-transfer-mode", "auto"]
    # Where memory can be pinned LMCache would take it bit by bit, and then shares none of it: chunks would be pickled.
    command += ["--shm-name", home.shm_name, "--no-l1-use-lazy"]
    if plan.lmcache_l2 is not None:
        command += [L2_OPTION, json.dumps(plan.lmcache_l2), "--l2-prefetch-policy", "retain"]  # chunks come again
    return Service(
        name=LMCACHE_SERVER,
        title=TITLES[LMCACHE_SERVER],
        command=tuple(command),
        port=ports["lmcache_server"],
        other_ports=(ports["lmcache_http"],),
        address=f"tcp://{plan.network.host(LMCACHE_SERVER)}:{ports['lmcache_server']}",
        health_url=f"http://{HOST}:{ports['lmcache_http']}/healthcheck",
        log_path=str(home.log(LMCACHE_SERVER)),
        environment=COMMON_ENVIRONMENT,
        directory=str(home.path),
        start_timeout_s=120.0,
    )


def _contender(spec: ContenderSpec, plan: Plan, home: Home) -> Service:
    """A server of the arena, on its share of the machine. Raises `StackError` for settings that its spec refuses."""
    port = plan.ports[spec.name]
    launch = plan.launch_on_its_share(spec.name)
    try:
        command = spec.server.command(launch)
    except ValueError as error:
        raise StackError(str(error)) from error
    return Service(
        name=spec.name,
        title=spec.title,
        command=tuple(command),
        port=port,
        address=f"http://{plan.network.host(spec.name)}:{port}",
        health_url=f"http://{HOST}:{port}{spec.health_path}",
        log_path=str(home.log(spec.name)),
        environment=spec.server.environment(launch),
        depends_on=spec.needs(launch) + plan.before_on_a_gpu(spec.name),
        cpus=plan.cpus(spec.name),
        directory=str(home.path),
        start_timeout_s=600.0 if plan.model.is_local else 7200.0,  # the first start of a hub model downloads it
        stop_timeout_s=20.0,
    )


def _page(plan: Plan, home: Home) -> Service:
    contenders = [
        spec.page_entry(f"http://{plan.network.host(spec.name)}:{plan.ports[spec.name]}")
        | {"public_url": f"http://{HOST}:{plan.ports[spec.name]}"}
        for spec in plan.specs
    ]
    lmcache_url = f"http://{plan.network.host(LMCACHE_SERVER)}:{plan.ports['lmcache_http']}"
    lmcache = {"name": LMCACHE_SERVER, "title": TITLES[LMCACHE_SERVER], "url": lmcache_url}
    script = project_root() / "frontend" / "app.py"
    command = [sys.executable, "-m", "streamlit", "run", str(script)]
    command += ["--server.address", plan.network.listen, "--server.port", str(plan.ports["page"])]
    command += ["--server.headless", "true", "--browser.gatherUsageStats", "false"]
    return Service(
        name="page",
        title=TITLES["page"],
        command=tuple(command),
        port=plan.ports["page"],
        address=f"http://{plan.network.host('page')}:{plan.ports['page']}",
        health_url=f"http://{HOST}:{plan.ports['page']}/_stcore/health",
        log_path=str(home.log("page")),
        environment={
            **COMMON_ENVIRONMENT,
            "KVARENA_CONTENDERS": json.dumps(contenders),
            "KVARENA_SERVICES": json.dumps([lmcache] if plan.needs_lmcache else []),
            "KVARENA_DATA_DIR": str(plan.data_dir),
            "KVARENA_CHUNK_TOKENS": str(plan.chunk_tokens),
            "KVARENA_TOKENIZER": plan.tokenizer_place,
            "KVARENA_RESULTS_DIR": str(plan.results_dir),
            "KVARENA_SEPARATOR": plan.blend.separator,
            **({"KVARENA_NOTICE": plan.notice} if plan.notice else {}),
        },
        directory=str(script.parent),
    )
