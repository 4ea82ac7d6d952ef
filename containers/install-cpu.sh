#!/bin/sh
# Installs all that `kvarena[EXTRAS]` depends on, in the pinned versions, into the virtual environment /opt/kvarena.
#
#   install-cpu.sh EXTRAS      in an image's build stage, with pyproject.toml and constraints/cpu.txt in /src
#
# The package itself is left out: it changes more often than these gigabytes do, so images have it in a layer of its own.
set -eu

# PyTorch's builds for CPUs, where the index can be reached; run-server.sh does the same.
torch_index=https://download.pytorch.org/whl/cpu

python3 -m venv /opt/kvarena
python=/opt/kvarena/bin/python3
mkdir -p /src/backend

if "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torch/", timeout=5)' "$torch_index" 2>/dev/null; then
    set -- "$1" --extra-index-url "$torch_index"
fi
extras=$1
shift
"$python" -m pip install --disable-pip-version-check --progress-bar off -c /src/constraints/cpu.txt "$@" "/src[$extras]"

# Nothing here needs the last three, and their builds for CUDA break transformers on CPU builds of torch.
"$python" -m pip uninstall --yes kvarena torchvision torchaudio torchcodec
