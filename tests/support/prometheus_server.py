"""A real Prometheus over the repository's configuration, with targets and a pace of the test's own."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.dashboard import FOLDER
from support.lmcache_server import free_port

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Prometheus:
    url: str

    def values(self, query: str) -> dict[tuple[str, ...], float]:
        """An instant query's result by its label values; one that isn't a number is left out."""
        reply = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=10, trust_env=False).json()
        assert reply["status"] == "success", f"{query}: {reply}"
        found = {tuple(row["metric"].values()): float(row["value"][1]) for row in reply["data"]["result"]}
        return {labels: value for labels, value in found.items() if not math.isnan(value)}

    def wait_for(
        self, query: str, holds: Callable[[dict[tuple[str, ...], float]], bool]
    ) -> dict[tuple[str, ...], float]:
        """The first result of which it holds; the last one when it never does."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while not holds(values := self.values(query)) and time.monotonic() < deadline:
            time.sleep(0.5)
        return values


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """`targets`: contenders by name, with their addresses. The test is skipped where there is no Prometheus."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on this machine")
    groups = [{"targets": [url.removeprefix("http://")], "labels": {"contender": n}} for n, url in targets.items()]
    (folder / "targets.yml").write_text(json.dumps(groups))  # JSON is YAML
    config = (FOLDER / "prometheus.yml").read_text()
    config = config.replace("scrape_interval: 5s", "scrape_interval: 1s").replace(
        "scrape_timeout: 4s", "scrape_timeout: 1s"
    )
    (folder / "prometheus.yml").write_text(config)
    url = f"http://127.0.0.1:{(port := free_port())}"
    command: list[Any] = [program, f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            _wait_until_ready(url, process, folder / "prometheus.log")
            yield Prometheus(url)
        finally:
            process.kill()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        try:
            if httpx.get(f"{url}/-/ready", timeout=2, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
