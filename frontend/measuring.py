"""A run over many questions, or over context lengths: `kvarena eval` or `kvarena bench ttft` in a process of its own,
with its progress, end and result file.

The page shows the same command, so that it can be repeated in a terminal. No Streamlit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import cycle, permutations
from math import factorial
from pathlib import Path

from chat import Context
from contender_api import RATIO, BlendOffer
from kvarena.client import API_KEY_VARIABLE
from kvarena.documents import QUESTIONS_NAME, SYSTEM_PROMPT_NAME
from kvarena.splitting import Splitter
from settings import ROOT, Contender

PROGRAM = "kvarena"
PACKAGES = ("matplotlib", "scipy")
MAX_ENUMERATED = 6  # of so many chunks all orders are listed
TAIL_BYTES = 4096
END_AFTER_S = 5.0
MIN_TIMED_S = 3.0
"""From then on, a stage's speed says how long the rest of it takes."""
PROGRESS = re.compile(r"(warming|scoring|joining|asking|measuring)\D[^\r\n]*?(\d+)/(\d+)")
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Plan(ABC):
    """What is asked of whom. `separator` goes between chunks."""

    contenders: tuple[Contender, ...]
    separator: str

    @abstractmethod
    def arguments(self, output: Path) -> list[str]:
        """Of the command that measures it."""

    def command(self, output: Path, on_the_host: Callable[[Path], Path] = Path) -> str:
        """For a terminal: with the contenders' addresses for people, and the host's paths."""
        addresses = {f"{one.name}={one.url}": f"{one.name}={one.address}" for one in self.contenders}
        words = [addresses.get(word, word) for word in self.arguments(output)]
        words = [str(on_the_host(Path(word))) if word.startswith("/") else word for word in words]
        return shlex.join([f".venv/bin/{PROGRAM}", *words])


@dataclass(frozen=True)
class QuestionsPlan(Plan):
    """`questions` is a file; the documents beside it are split as the page splits them."""

    questions: Path
    policies: tuple[str, ...]
    ratios: tuple[float, ...]
    max_tokens: int
    limit: int | None = None
    splitter: Splitter = field(default_factory=Splitter)

    def arguments(self, output: Path) -> list[str]:
        arguments = ["eval", "--questions", str(self.questions), "--output", str(output)]
        for contender in self.contenders:
            arguments += ["--contender", f"{contender.name}={contender.url}"]
        for policy in self.policies:
            arguments += ["--policy", policy]
        if self.policies:
            arguments += ["--ratio", ",".join(f"{ratio:g}" for ratio in self.ratios)]
        arguments += ["--separator", self.separator, "--max-tokens", str(self.max_tokens)]
        arguments += ["--chunk-tokens", str(self.splitter.chunk_tokens)]
        if self.splitter.tokenizer_file:
            arguments += ["--tokenizer", str(self.splitter.tokenizer_file.absolute().parent)]
        return arguments + (["--limit", str(self.limit)] if self.limit else [])


DEFAULT_LENGTHS = (512, 1000, 2000, 4000, 8000, 16_000, 32_000)
USUAL_LONGEST = 4000
LEAST_LENGTH = 16
ROOM_TOKENS = 85
"""For what a prompt has besides its context: the text before it, the question, and the answer."""


@dataclass(frozen=True)
class LengthsPlan(Plan):
    """`lengths` of the context are in tokens; `data` is the folder of documents that contexts are made of.

    `settings` are a blend's, such as `kv_deviation:0.15`. Without `tokenizer` the first server's is used.
    """

    data: Path
    settings: tuple[str, ...]
    lengths: tuple[int, ...]
    num_repeats: int
    tokenizer: Path | None = None

    def arguments(self, output: Path) -> list[str]:
        arguments = ["bench", "ttft", "--data", str(self.data), "--output", str(output)]
        for contender in self.contenders:
            arguments += ["--target", f"{contender.name}={contender.url}"]
        for setting in self.settings:
            arguments += ["--policy", setting]
        arguments += ["--context-tokens", ",".join(map(str, self.lengths)), "--repeats", str(self.num_repeats)]
        arguments += ["--state", "warm", "--max-new-tokens", "1", "--separator", self.separator]
        return arguments + (["--tokenizer", str(self.tokenizer)] if self.tokenizer else [])


def blend_settings(offer: BlendOffer, policies: Sequence[str], ratios: Sequence[float]) -> tuple[str, ...]:
    """Every policy with every ratio, if it takes one; the server's own policy if none is chosen."""
    assert offer.policy, "a blend has policies"
    found = []
    for policy in policies or [offer.policy.default]:
        has_ratio = any(parameter.name == RATIO for parameter in offer.parameters_of(policy, within_time=False))
        found += [f"{policy}:{ratio:g}" for ratio in ratios] if has_ratio else [policy]
    return tuple(dict.fromkeys(found))


def default_lengths(limit: int | None, num_document_tokens: int) -> list[int]:
    """Those that fit into a context of `limit` tokens, up to the usual longest or the size of all documents."""
    room = max(LEAST_LENGTH, limit - ROOM_TOKENS) if limit else max(DEFAULT_LENGTHS)
    longest = min(room, max(USUAL_LONGEST, num_document_tokens))
    fitting = [length for length in DEFAULT_LENGTHS if length <= longest]
    return fitting if len(fitting) > 1 else sorted({max(LEAST_LENGTH, room // part) for part in (4, 2, 1)})


def read_lengths(text: str, limits: Iterable[tuple[str, int | None]]) -> tuple[int, ...]:
    """In ascending order, each once. `limits` are the contenders' titles with their longest contexts, if known.

    Raises `ValueError` in words for the page.
    """
    if grouped := re.search(r"\b\d{1,2},\d{3}\b|\b\d+,0\d\d\b", text):
        raise ValueError(f"Write {grouped.group().replace(',', '')}, without a comma inside a number.")
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ValueError(f"{text!r} isn't a list of lengths in tokens, separated by commas.") from error
    if lengths[0] < LEAST_LENGTH:
        raise ValueError(f"A context has at least {LEAST_LENGTH} tokens, not {lengths[0]:,}.")
    for title, limit in limits:
        if limit is not None and lengths[-1] + ROOM_TOKENS > limit:
            raise ValueError(
                f"{lengths[-1]:,} tokens are too many for {title}: it takes {limit:,} with the question and the answer "
                f"in them, so a context of {max(0, limit - ROOM_TOKENS):,}."
            )
    return tuple(lengths)


def missing_for_measuring() -> list[str]:
    """What the command needs of the extra `bench` and isn't installed. Servers are asked by HTTP, so torch isn't
    needed.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return missing if _program().is_file() else [PROGRAM, *missing]


def install_command() -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", f"{ROOT}[bench]"])


def folder_for_results(wanted: Path, own: Path) -> Path:
    """`wanted` if this user can write there, else `own`. Raises `OSError` if neither can be made."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError:
        can_write = False
    else:
        can_write = os.access(wanted, os.W_OK | os.X_OK)
    if can_write:
        return wanted
    own.mkdir(parents=True, exist_ok=True)
    return own


def _program() -> Path:
    return Path(sys.executable).with_name(PROGRAM)


def read_own_questions(text: str, known: Callable[[str], str]) -> dict[str, str]:
    """One in each line; after a bar the answer that counts as right, else the one that is `known`; empty if nobody
    knows.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        question, _, answer = map(str.strip, line.partition("|"))
        if question:
            found.setdefault(question, answer or known(question))
    return found


def write_own_questions(folder: Path, context: Context, asked: Mapping[str, str], num_prompts: int) -> Path:
    """Writes the context's documents and a file of questions over them, and returns that file: `num_prompts` prompts,
    the questions taking turns, each prompt with another order of the chunks.

    There are no more orders than the chunks have. The same context gives the same orders.
    """
    names = write_documents(folder, context.texts)
    if context.system:
        (folder / SYSTEM_PROMPT_NAME).write_text(context.system, encoding="utf-8")
    found = orders(names, num_prompts)  # one for each prompt, as far as there are enough
    prompts = [
        (own, found[(turn + place) % len(found)]) for turn in range(len(found)) for place, own in enumerate(asked)
    ]
    if len(found) == num_prompts:
        prompts = list(zip(cycle(asked), found, strict=False))
    lines = [
        json.dumps({"question": own, "answers": [asked[own]] * bool(asked[own]), "chunks": order, "kind": "shuffled"})
        for own, order in prompts[:num_prompts]
    ]
    path = folder / QUESTIONS_NAME
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_documents(folder: Path, texts: Sequence[str]) -> list[str]:
    """Into a new folder, in this order; returns the names of their chunks."""
    folder.mkdir(parents=True)
    names = [f"{number:02}" for number in range(1, len(texts) + 1)]
    for name, text in zip(names, texts, strict=True):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return names


def orders(names: Sequence[str], num_orders: int) -> list[list[str]]:
    """All different. The given one, which a chat may have used, comes only if all are wanted."""
    rng = random.Random(0)
    wanted = min(num_orders, factorial(len(names)))
    if len(names) <= MAX_ENUMERATED:
        first, *others = map(list, permutations(names))
        return [*rng.sample(others, min(wanted, len(others))), first][:wanted]
    found: dict[tuple[str, ...], None] = {}
    while len(found) < wanted:
        if (order := tuple(rng.sample(names, len(names)))) != tuple(names):
            found[order] = None
    return [list(order) for order in found]


def readable_time(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


@dataclass(frozen=True)
class Progress:
    """`text` says what is under way; `share` of it is done, from 0 to 1."""

    text: str
    share: float


class Measurement:
    """One run of the command. Owns the process: call `stop`, or wait for its end."""

    def __init__(self, plan: Plan, output: Path, api_key: str = "") -> None:
        """Starts it. Raises `OSError` where the folder of the results can't be written."""
        output.parent.mkdir(parents=True, exist_ok=True)
        self.plan, self.output = plan, output
        self.is_stopped = self.is_ended = False
        self._stage, self._stage_from = "", (0.0, 0.0)
        self._log = output.with_suffix(".log")
        environment = {
            **os.environ,
            API_KEY_VARIABLE: api_key,
            "TTY_COMPATIBLE": "1",
            "TERM": "xterm",
            "COLUMNS": "120",
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [_program(), *plan.arguments(output)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def progress(self) -> Progress:
        found = PROGRESS.findall(self._tail())
        if not found:
            return Progress("starting", 0.0)
        text, done, total = found[-1]
        share = min(1.0, int(done) / max(int(total), 1))
        return Progress(f"{text}: {done} of {total}{self._time_left(text, share)}", share)

    def _time_left(self, stage: str, share: float) -> str:
        """Of the current stage, at its speed so far; empty if that isn't known yet."""
        if stage != self._stage:
            self._stage, self._stage_from = stage, (time.monotonic(), share)
        began_s, done = self._stage_from
        spent_s = time.monotonic() - began_s
        if share <= done or spent_s < MIN_TIMED_S:
            return ""
        return f", {readable_time(spent_s * (1 - share) / (share - done))} left"

    @property
    def has_result(self) -> bool:
        """Also of a run that ended early."""
        return not self.is_running and self.output.is_file()

    def problem(self) -> str:
        """The command's last line, if it ended by itself without a whole result, which is saved as it grows; else
        empty.
        """
        if self.is_running or self.is_stopped or (self.has_result and self._is_whole()):
            return ""
        lines = [line.strip() for line in self._tail().splitlines() if line.strip()]
        return lines[-1] if lines else f"The command ended with status {self._process.returncode}."

    def _is_whole(self) -> bool:
        """Failed requests give status 1, and so does an error of the command, but then lengths are missing."""
        if self._process.returncode not in (0, 1):
            return False
        if not isinstance(self.plan, LengthsPlan):
            return True
        try:
            rows = json.loads(self.output.read_text(encoding="utf-8"))["rows"]
            return {row["context_tokens"] for row in rows} >= set(self.plan.lengths)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def stop(self) -> None:
        """Like Ctrl-C in a terminal: what was answered so far is saved, unless a second one interrupts that."""
        if self.is_running and not self.is_stopped:
            self.is_stopped, self._stopped_s = True, time.monotonic()
            self._process.send_signal(signal.SIGINT)

    @property
    def may_end(self) -> bool:
        """Whether it was stopped a while ago and still runs, for instance if a server doesn't answer."""
        return self.is_stopped and self.is_running and time.monotonic() - self._stopped_s >= END_AFTER_S

    def end(self) -> None:
        """At once; unsaved answers are lost."""
        if self.is_running:
            self.is_stopped = self.is_ended = True
            self._process.terminate()

    def _tail(self) -> str:
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - TAIL_BYTES))
            return COLOURS.sub("", log.read().decode("utf-8", errors="replace"))


def new_output(results_dir: Path) -> Path:
    return results_dir / f"run-{datetime.now():%Y%m%d-%H%M%S}.json"
