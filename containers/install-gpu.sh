#!/bin/sh
# Installs `kvarena[gpu]` into the Python of an image that has vLLM, or into one that has nothing yet.
#
#   install-gpu.sh WHEEL CONSTRAINTS
#
# What the image was built and tested with stays as it is, but for tools of its distribution; what is missing comes in the
# pinned versions.
set -eu
wheel=$1
pinned=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One spelling of every name: lower case, with hyphens. LMCache is ours to choose, whichever one the image has.
normalise() {
    awk -F '==' '/==/ { name = tolower($1); gsub(/[_.]/, "-", name); print name "==" $2 }'
}
python3 -m pip list --format=freeze | normalise | grep -Ev '^(pip|setuptools|wheel|lmcache|kvarena)==' >"$work/there" || true
normalise <"$pinned" | awk -F '==' 'NR == FNR { there[$1]; next } !($1 in there)' "$work/there" - >"$work/missing"
cat "$work/there" "$work/missing" >"$work/constraints"
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --disable-pip-version-check --progress-bar off \
    -c "$work/constraints" "${wheel}[gpu]"
