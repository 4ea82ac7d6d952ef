"""Brings one small, never healthy service up in the home of the environment; for tests that interrupt it."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from kvarena.cli import run
from kvarena.contenders.servers import COMMON_ENVIRONMENT
from kvarena.home import Home
from kvarena.stack import lifecycle
from kvarena.stack.record import Record
from kvarena.stack.service import Service


def main() -> None:
    port = int(sys.argv[1])
    home = Home.find()
    script = Path(__file__).with_name("small_service.py")
    service = Service(
        name="slow",
        title="slow",
        command=(sys.executable, str(script), str(port), "--healthy-after", "3600"),
        port=port,
        address=f"http://127.0.0.1:{port}",
        health_url=f"http://127.0.0.1:{port}/health",
        log_path=str(home.log("slow")),
        environment=COMMON_ENVIRONMENT,
        directory=str(home.path),
        stop_timeout_s=3.0,
    )
    record = Record(services=(service,), run_folder="", data_dir="data", served_model="town")
    lifecycle.bring_up(record, home, Console(), check=lambda missing: None, secrets={})


if __name__ == "__main__":
    run(main)
