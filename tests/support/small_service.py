"""A real service in miniature: answers its health address, has a child process, and can be told to fail.

    python small_service.py PORT [--healthy-after S] [--die-after S] [--ignore-sigterm] [--segment]

The child sleeps for ever, and renames its own command line as servers do. With `--segment` it has shared memory, as
vLLM's engines do, and leaves it when it is stopped.
"""

from __future__ import annotations

import argparse
import http.server
import os
import signal
import subprocess
import sys
import threading
import time

SEGMENT = (
    "from multiprocessing import resource_tracker, shared_memory; "
    "segment = shared_memory.SharedMemory(create=True, size=4096); "
    "resource_tracker.unregister(segment._name, 'shared_memory'); "
    "print('segment', segment.name, flush=True)"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--healthy-after", type=float, default=0.0)
    parser.add_argument("--die-after", type=float)
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--segment", action="store_true")
    options = parser.parse_args()
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = "import setproctitle, time; setproctitle.setproctitle('small::child'); time.sleep(3600)"
    if options.segment:
        child = f"{SEGMENT}; {child}"
    subprocess.Popen([sys.executable, "-c", child])
    print(f"listening on {options.port}", flush=True)
    if options.die_after is not None:
        threading.Timer(options.die_after, _die).start()
    healthy_at = time.monotonic() + options.healthy_after

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if time.monotonic() >= healthy_at else 503)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Keeps the log to the lines that tests look for."""

    http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


def _die() -> None:
    print("boom: out of luck", flush=True)
    os._exit(7)


if __name__ == "__main__":
    main()
