"""Which result is looked at: one of the files in the folders, or one that is opened from elsewhere.

The files are those of the results folder, newest first, then those that came with the project.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import streamlit as st

import settings
import state
from eval_results import EvalResult, read_result


@dataclass(frozen=True)
class ResultFile:
    """`modified_ns` beside the path tells a file that was written anew from the one before."""

    path: Path
    name: str
    shipped: bool
    modified_ns: int

    @property
    def title(self) -> str:
        if self.shipped:
            return f"{self.name} · came with the project"
        return f"{self.name} · {datetime.fromtimestamp(self.modified_ns / 1e9):%Y-%m-%d %H:%M}"


def find_result_files(results_dir: Path, shipped_dir: Path) -> list[ResultFile]:
    """Every JSON file of the two folders and theirs, each once; whose it is, its content must say."""
    files = [*_files_of(results_dir, shipped=False), *_files_of(shipped_dir, shipped=True)]
    return list({file.path: file for file in reversed(files)}.values())[::-1]


def _files_of(folder: Path, shipped: bool) -> list[ResultFile]:
    paths = [path for path in folder.rglob("*.json") if path.is_file()]
    files = [
        ResultFile(path.resolve(), str(path.relative_to(folder)), shipped, path.stat().st_mtime_ns) for path in paths
    ]
    return sorted(files, key=lambda file: (-file.modified_ns, file.name))


COMMAND = ".venv/bin/kvarena eval"
CHOICE, UPLOAD, UPLOADED = "result-file", "upload", ""


def pick_result() -> EvalResult | None:
    """None where there is none; the page then says what to do about it. Files that can't be read are named there."""
    titles, results = _results_in_folders()
    choice, opener = st.columns([5, 1], vertical_alignment="bottom")
    with opener, st.popover("Open a file", width="stretch"):
        uploaded = st.file_uploader(
            "A result file from elsewhere", type="json", key=UPLOAD, on_change=_choose_uploaded, max_upload_size=50
        )
    if uploaded is not None and (result := _read(uploaded.name, uploaded.getvalue().decode(errors="replace"))):
        titles = {UPLOADED: uploaded.name, **titles}
        results[UPLOADED] = result
    if not titles:
        _draw_what_to_do()
        return None
    if st.session_state.get(CHOICE) not in titles:
        st.session_state.pop(CHOICE, None)
    chosen = choice.selectbox(
        "Result file", list(titles), format_func=lambda key: titles[key], key=CHOICE, persist_state="session"
    )
    return results[chosen]


def _choose_uploaded() -> None:
    st.session_state[CHOICE] = UPLOADED


def _results_in_folders() -> tuple[dict[str, str], dict[str, EvalResult]]:
    """Titles and results by path."""
    titles, results = {}, {}
    for file in find_result_files(state.page_settings().results_dir, settings.SHIPPED_RESULTS_DIR):
        try:
            result = _read_file(file.path, file.modified_ns)
        except (OSError, ValueError) as error:
            _draw_broken(str(file.path), error)
            continue
        if result is not None:
            titles[str(file.path)] = file.title
            results[str(file.path)] = result
    return titles, results


@st.cache_resource(max_entries=64, show_spinner=False)
def _read_file(path: Path, modified_ns: int) -> EvalResult | None:
    return read_result(path.read_text(encoding="utf-8"))


def _read(name: str, text: str) -> EvalResult | None:
    try:
        result = read_result(text)
        if result is None:
            raise ValueError("it holds something else")
    except ValueError as error:
        _draw_broken(name, error)
        return None
    return result


def _draw_broken(name: str, error: Exception) -> None:
    st.warning(f"`{name}` can't be read as a result of `kvarena eval`: {error}")


def _draw_what_to_do() -> None:
    st.info(
        "There is no result yet. This command asks the questions that come with the chunks, with and without reuse, "
        "and saves what was answered:"
    )
    st.code(COMMAND, language="sh")
    st.caption(f"Results are looked for in {state.page_settings().results_dir} and the folders in it.")
