"""Where a stack keeps its state: `.kvarena/` of the project's folder, or the folder that `KVARENA_HOME` names.

One folder is one instance of the stack. Its path, as the value of `KVARENA_INSTANCE`, marks every process of the
instance, so that they can be told from other stacks on the machine even when their supervisor is gone.

`StackError` is for the person at the command line: a message, and the exit status.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INSTANCE_VARIABLE = "KVARENA_INSTANCE"
SERVICE_VARIABLE = "KVARENA_SERVICE"
"""Its value, in the environment of a service and of all that it starts, is the service's name."""
MAX_RUN_FOLDER_BYTES = 107 - len("/00000000-0000-0000-0000-000000000000")
"""The kernel's limit for the path of a socket, less the names that vLLM gives its own."""
RUN_FOLDER_PREFIX = "kvarena-"


def project_root() -> Path:
    """The folder with `pyproject.toml` and `frontend/`; the working directory when the package lies elsewhere."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def short_path(path: str) -> str:
    """For a message: relative to the working directory where it is below that."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


class StackError(Exception):
    """The command can't go on. `str(error)` is the whole message, and says what to do."""

    exit_code = 1


@dataclass(frozen=True)
class Home:
    """The state folder of one instance. Paths only; nothing exists before `create`."""

    path: Path

    @classmethod
    def find(cls) -> Home:
        given = os.environ.get("KVARENA_HOME")
        return cls(Path(given).expanduser().resolve() if given else project_root() / ".kvarena")

    def create(self) -> None:
        for folder in (self.path, self.logs, self.cache):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def cache(self) -> Path:
        """Compiled kernels and the like: safe to delete, slow to make again."""
        return self.path / "cache"

    @property
    def chunks(self) -> Path:
        """LMCache's second tier, where no other is named."""
        return self.path / "chunks"

    @property
    def models(self) -> Path:
        """Models that were converted here."""
        return self.path / "models"

    @property
    def record(self) -> Path:
        """What runs: see `kvarena.stack.record`."""
        return self.path / "stack.json"

    @property
    def secrets(self) -> Path:
        """Files of the secrets that containers are given; there while they run."""
        return self.path / "secrets"

    @property
    def daemon_config(self) -> Path:
        return self.path / "supervisord.conf"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def chunk_index(self, model: str) -> Path:
        """The blend's index of known chunks: token ids, so one per model."""
        return self.path / f"chunks-{_short_hash(model)}.index"

    @property
    def shm_name(self) -> str:
        """Of LMCache's memory, which the whole machine sees: only this instance has it."""
        return f"kvarena-{_short_hash(str(self.path))}"

    @property
    def usual_run_folder(self) -> Path:
        return self.path / "run"

    def new_run_folder(self) -> Path:
        """An empty folder only this user can enter, for the sockets and temporary files of one run.

        In the state folder; below `/tmp` when that path is too long for the sockets in it. Whoever makes it records it.
        """
        folder = self.usual_run_folder
        if len(os.fsencode(folder)) > MAX_RUN_FOLDER_BYTES:
            return Path(tempfile.mkdtemp(prefix=RUN_FOLDER_PREFIX, dir="/tmp"))
        self.remove_run_folder(folder)
        folder.mkdir(mode=0o700)
        return folder

    def remove_run_folder(self, folder: Path) -> None:
        """Removes a folder that `new_run_folder` made, and no other."""
        if folder == self.usual_run_folder or folder.name.startswith(RUN_FOLDER_PREFIX):
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One command at a time changes this instance; the kernel drops the lock of one that was killed."""
        self.create()
        with (self.path / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise StackError(
                    f"another kvarena command (process {holder}) is at work on {self.path}; "
                    "wait for it, or stop it with Ctrl-C"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield


def _short_hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]
