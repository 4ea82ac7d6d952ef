"""Which result is shown: one of the files in the folders, or one that is opened from elsewhere.

First come the files of the results folder and of the page's own, newest first, then those shipped with the project.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

import settings
import state
from eval_results import read_result
from kvarena.panels.kinds import EVAL, TTFT

SHIPPED, OWN = "docs/", "page/"


@dataclass(frozen=True)
class FoundFile:
    """`modified_ns` distinguishes a file from an earlier one at the same path."""

    path: Path
    name: str
    modified_ns: int
    folder: str = ""
    """As in the page's address: `SHIPPED`, `OWN`, or empty for the results folder."""

    @property
    def link(self) -> str:
        """Its name in the page's address."""
        return f"{self.folder}{self.name}"

    @property
    def title(self) -> str:
        if self.folder == SHIPPED:
            return f"{self.name} · came with the project"
        return f"{self.name} · {datetime.fromtimestamp(self.modified_ns / 1e9):%Y-%m-%d %H:%M}"


def find_result_files(results_dir: Path, shipped_dir: Path, own_dir: Path | None = None) -> list[FoundFile]:
    """Every JSON file below these folders, each once, whatever is in it."""
    files = [*measured_files(results_dir, own_dir), *_newest_first(_files_of(shipped_dir, SHIPPED))]
    return list({file.path: file for file in reversed(files)}.values())[::-1]


def measured_files(results_dir: Path, own_dir: Path | None) -> list[FoundFile]:
    return _newest_first([*_files_of(results_dir), *(_files_of(own_dir, OWN) if own_dir else [])])


def _files_of(place: Path, folder: str = "") -> list[FoundFile]:
    paths = [path for path in place.rglob("*.json") if path.is_file()]
    return [FoundFile(path.resolve(), str(path.relative_to(place)), path.stat().st_mtime_ns, folder) for path in paths]


def _newest_first(files: list[FoundFile]) -> list[FoundFile]:
    return sorted(files, key=lambda file: (-file.modified_ns, file.name))


COMMAND = ".venv/bin/kvarena eval"
MEASURED_AGE_S, MOST_MEASURED = 5.0, 64
CHOICE, OTHER, UPLOAD, UPLOADED = "result-file", "other-file", "upload", "opened-here"


@dataclass(frozen=True)
class Opened:
    """A file of any kind that the project writes."""

    title: str
    result: Mapping[str, Any]

    @property
    def models(self) -> set[str]:
        """What the contenders of an eval served."""
        contenders = self.result["settings"].get("contenders")
        return {str(one.get("model")) for one in contenders.values()} if isinstance(contenders, Mapping) else set()

    @property
    def benchmark(self) -> str:
        return str(self.result["settings"]["benchmark"])


def pick_result() -> tuple[Opened, Opened | None] | None:
    """One file, and another of its kind to compare it with; the page's address names both. None if there is none: the
    page then says how to make one. Files that can't be read are named there.
    """
    files = _results_in_folders()
    choice, other, opener = st.columns([4, 3, 1.4], vertical_alignment="bottom")
    with opener, st.popover("Open a file", width="stretch"):
        uploaded = st.file_uploader(
            "A result file from elsewhere", type="json", key=UPLOAD, on_change=_choose_uploaded, max_upload_size=50
        )
    if uploaded is not None and (opened := _read(uploaded.name, uploaded.getvalue().decode(errors="replace"))):
        files = {UPLOADED: opened, **files}
    if not files:
        _draw_what_to_do()
        return None
    titles = {key: file.title for key, file in files.items()}
    served = {session.server.model for session in state.chat_sessions().values() if session.server}
    key = _draw_choice(choice, "Result file", titles, CHOICE, opened_first(files, served))
    chosen = files[key]
    if key.startswith(SHIPPED) and all(one.startswith(SHIPPED) for one in files):
        st.info(NOT_MEASURED_HERE)
    same = {key: file.title for key, file in files.items() if file.benchmark == chosen.benchmark and file is not chosen}
    if not same:
        return chosen, None
    compared = _draw_choice(other, "Compare with", {NOTHING: NOTHING, **same}, OTHER, NOTHING)
    return chosen, None if compared == NOTHING else files[compared]


NOTHING = "nothing"
NOT_MEASURED_HERE = (
    "Nothing was measured here yet. The results that came with the project are from other machines, and perhaps of "
    "another model than yours; the line below says which. What you measure on the page Measure, or by `kvarena eval`, "
    "comes first."
)


def opened_first(files: Mapping[str, Opened], served: Collection[str] = ()) -> str:
    """The newest eval or time to first token measured here, else a shipped eval, preferably of a model that is
    `served`, else any.
    """
    own = [key for key, file in files.items() if not key.startswith(SHIPPED) and file.benchmark in (EVAL, TTFT)]
    evals = [key for key, file in files.items() if key.startswith(SHIPPED) and file.benchmark == EVAL]
    of_served = [key for key in evals if files[key].models & set(served)]
    return next(iter([*own, *of_served, *evals, *files]))


def _draw_choice(place: DeltaGenerator, label: str, titles: Mapping[str, str], key: str, default: str) -> str:
    """The default if the earlier choice is gone."""
    state.choose_linked(key, titles, label)
    if st.session_state.get(key) not in titles:
        st.session_state.pop(key, None)
    names = list(titles)
    chosen = str(
        place.selectbox(
            label,
            names,
            index=names.index(default),
            format_func=lambda name: titles[name],
            key=key,
            persist_state="session",
        )
    )
    state.link(key, chosen)
    return chosen


def choose_file(path: Path) -> None:
    """Chooses the file that Quality opens with, one that was measured here."""
    st.session_state[CHOICE] = next(file.link for file in _measured_files() if file.path == path.resolve())


def _measured_files() -> list[FoundFile]:
    own = state.page_settings()
    return measured_files(own.results_dir, own.own_results_dir)


@st.cache_resource(ttl=MEASURED_AGE_S, show_spinner=False)
def measured_results(benchmark: str) -> list[Mapping[str, Any]]:
    """Newest first, without those shipped with the project; unreadable ones are left out."""
    found: list[Mapping[str, Any]] = []
    try:
        files = _measured_files()[:MOST_MEASURED]
    except OSError:  # a file has gone meanwhile
        return []
    for file in files:
        with suppress(OSError, ValueError):
            result = _read_file(file.path.resolve(), file.modified_ns)
            if result["settings"].get("benchmark") == benchmark:
                found.append(result)
    return found


def _choose_uploaded() -> None:
    st.session_state[CHOICE] = UPLOADED


def _results_in_folders() -> dict[str, Opened]:
    """By their names in the page's address."""
    found = {}
    own = state.page_settings()
    for file in find_result_files(own.results_dir, settings.SHIPPED_RESULTS_DIR, own.own_results_dir):
        try:
            result = _read_file(file.path, file.modified_ns)
        except (OSError, ValueError) as error:
            _draw_broken(str(file.path), error)
            continue
        found[file.link] = Opened(f"{file.title} · {result['settings']['benchmark']}", result)
    return found


@st.cache_resource(max_entries=256, show_spinner=False)
def _read_file(path: Path, modified_ns: int) -> dict[str, Any]:
    return read_result(path.read_text(encoding="utf-8"))


def _read(name: str, text: str) -> Opened | None:
    try:
        return Opened(name, read_result(text))
    except ValueError as error:
        _draw_broken(name, error)
        return None


def _draw_broken(name: str, error: Exception) -> None:
    st.warning(f"`{name}` can't be read as a result: {error}")


def _draw_what_to_do() -> None:
    st.info(
        "There is no result yet. This command asks the questions that come with the chunks, with and without reuse, "
        "and saves what was answered:"
    )
    st.code(COMMAND, language="sh")
    st.caption(f"Results are looked for in {state.page_settings().results_dir} and the folders in it.")
