"""What is written out of the specs and of the policies is current; and a new contender needs its spec only."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvarena.home import project_root
from kvarena.stack import generate
from kvarena.stack.generate import COMMAND, SECTIONS, generated
from kvarena.stack.settings import SPECS
from support.project_copy import copy_project, example_of, run_in

SERVICES = """
import dataclasses, json, sys
from pathlib import Path
from kvarena.home import Home
from kvarena.stack.plan import make_plan
from kvarena.stack.services import build_services
from kvarena.stack.settings import load_settings

plan = make_plan(load_settings(contenders="plain,echo", model="town", profile="cpu"), Home(Path(sys.argv[1])))
print(json.dumps([dataclasses.asdict(service) for service in build_services(plan, Home(Path(sys.argv[1])))]))
"""


def test_the_generated_files_are_current() -> None:
    stale = [path.name for path, text in generated(project_root()).items() if path.read_text() != text]
    assert not stale, f"run {COMMAND}"


def test_no_two_things_have_one_anchor() -> None:
    anchors = re.findall(r"&([\w-]+)", (project_root() / "compose.yaml").read_text())
    assert len(set(anchors)) == len(anchors)


def test_a_section_that_was_lost_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"compose.yaml has no section between '# >>> contenders: \.\.\.' and"):
        next(section for section in SECTIONS if section.name == "contenders").in_text("services:\n")


def test_of_two_contenders_with_slots_the_page_is_told_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(SPECS["ai100"], name="other", port=8090)
    monkeypatch.setattr(generate, "SPECS", {**SPECS, "other": other})
    assert list(generate.page_defaults())[-1] == 'SLOTS_CONTENDER = "ai100"'


@pytest.fixture(scope="module")
def with_echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the contender of CONTRIBUTING.md, and with what is generated written anew."""
    copy = copy_project(tmp_path_factory.mktemp("project"))
    example = example_of("Add a contender").replace("port=8006", "port=8090")  # the next free one may be taken by now
    (copy / "backend" / "kvarena" / "contenders" / "echo.py").write_text(example)
    run_in(copy, "-m", "kvarena.stack.generate")
    return copy


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_a_new_contender_is_a_choice(with_echo: Path) -> None:
    said = " ".join(run_in(with_echo, "-c", "from kvarena.cli import main; main()", "up", "--help").split())
    assert ", echo, separated by commas" in said
    assert "echo N+90" in said


def test_a_new_contender_is_a_service_that_the_page_knows(with_echo: Path, tmp_path: Path) -> None:
    services = {service["name"]: service for service in services_of(with_echo, tmp_path, ECHO_NUM_WORDS="3")}
    assert list(services) == ["plain", "echo", "page"]
    echo = services["echo"]
    assert (echo["title"], echo["port"], echo["health_url"]) == ("The echo", 8090, "http://127.0.0.1:8090/health")
    assert echo["command"][1:3] == ["-m", "kvarena.contenders.echo"]
    assert echo["command"][echo["command"].index("--num-words") + 1] == "3", "it has no program that would read them"
    assert json.loads(services["page"]["environment"]["KVARENA_CONTENDERS"])[1] == {
        "name": "echo",
        "title": "The echo",
        "explanation": "Says the last words again.",
        "url": "http://127.0.0.1:8090",
        "approximate": True,
        "report": "",
        "icon": "",
        "public_url": "http://127.0.0.1:8090",
    }
    moved = services_of(with_echo, tmp_path, PORT_BASE="9000")
    assert next(service["port"] for service in moved if service["name"] == "echo") == 9090


def services_of(copy: Path, home: Path, **settings: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run_in(copy, "-c", SERVICES, str(home), **settings))
    return found


def test_a_new_contender_is_a_container_and_a_prometheus_target(with_echo: Path) -> None:
    compose = read(with_echo / "compose.yaml")
    echo = compose["services"]["echo"]
    assert (echo["profiles"], echo["command"], echo["image"]) == (["cpu"], ["echo"], "kvarena-engines")
    assert echo["ports"] == ["127.0.0.1:${ECHO_PORT:-8090}:8090"]
    assert echo["healthcheck"]["test"][-1] == "http://127.0.0.1:8090/health"
    assert "ECHO_NUM_WORDS" in echo["environment"]
    assert echo["environment"]["CONTENDERS"].removesuffix("}").split(",")[-1] == "echo"
    for name, host in (("targets.yml", "127.0.0.1"), ("targets.containers.yml", "echo")):
        targets = {group["labels"]["contender"]: group["targets"] for group in read(with_echo / "observability" / name)}
        assert targets["echo"] == [f"{host}:8090"]


def test_a_new_contender_is_in_the_example_of_settings(with_echo: Path) -> None:
    lines = (with_echo / ".env.example").read_text().splitlines()
    assert {"#ECHO_PORT=8090", "# How many words.", "#ECHO_NUM_WORDS=7"} <= set(lines)
