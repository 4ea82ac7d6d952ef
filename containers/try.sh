#!/usr/bin/env bash
# Starts the services of the images cpu, engines and page, one after the other, and has each answer a request.
#
#   containers/try.sh [IMAGE ...]      IMAGE: cpu, engines, page; all where none is named. containers/build.sh first
#
# PORT_BASE (18000) is where their ports begin. Docker, Podman or buildah start them: see builder.sh. buildah does it in
# chroots on this machine's network, with nothing limited; instead of a read-only root, it is checked that no service
# has written where that would forbid it.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=containers/builder.sh
source "$root/containers/builder.sh"

port_base=${PORT_BASE:-18000}
start_limit_s=300
logs=$(mktemp -d)
declare -A containers=() processes=()
# >>> contenders: written by python -m kvarena.stack.generate
contenders=blend,plain,prefix,simllm,ai100,lmcache
declare -A services=(
    [cpu]="blend plain lmcache"
    [engines]="prefix simllm ai100"
)
declare -A health=(
    [blend]=0/health
    [plain]=1/health
    [prefix]=2/health
    [simllm]=3/health
    [ai100]=4/health
    [lmcache]=5/health
)
# <<< contenders
services[cpu]="lmcache-server ${services[cpu]}"
services[page]=page
health[lmcache-server]=503/healthcheck
health[page]=501/_stcore/health

url() {
    local offset=${1%%/*}
    echo "http://127.0.0.1:$((port_base + offset))/${1#*/}"
}

start() {
    local image=$1 service=$2
    local -a environment=(--env "PORT_BASE=$port_base" --env "CONTENDERS=$contenders" --env MODEL=town)
    if [[ $builder == buildah ]]; then
        touch "$logs/$service.start"
        containers[$service]=$(buildah from --add-host lmcache-server:127.0.0.1 "kvarena-$image")
        buildah run --isolation chroot "${environment[@]}" "${containers[$service]}" -- \
            python3 -m kvarena.stack.serve "$service" >"$logs/$service" 2>&1 &
    else
        containers[$service]=kvarena-try-$service
        "$builder" run --rm --name "${containers[$service]}" --network host --add-host lmcache-server:127.0.0.1 \
            --ipc host --read-only --tmpfs /tmp "${environment[@]}" "kvarena-$image" "$service" >"$logs/$service" 2>&1 &
    fi
    processes[$service]=$!
}

wait_until_healthy() {
    local service=$1 deadline=$((SECONDS + start_limit_s))
    until curl --silent --fail --max-time 3 "$(url "${health[$service]}")" >/dev/null; do
        kill -0 "${processes[$service]}" 2>/dev/null || fail "$service ended: $(tail -n 15 "$logs/$service")"
        ((SECONDS < deadline)) || fail "$service was not healthy in $start_limit_s s: $(tail -n 15 "$logs/$service")"
        sleep 1
    done
}

# Fails if a service runs as root, or wrote outside of what compose.yaml mounts for it. Docker and Podman see to both.
check_rights() {
    local service=$1 folder written
    [[ $builder == buildah ]] || return 0
    [[ $(buildah run --isolation chroot "${containers[$service]}" -- id -u) == 1000 ]] || fail "$service runs as root"
    folder=$(buildah mount "${containers[$service]}")
    written=$(find "$folder" -xdev -type f -newer "$logs/$service.start" -user 1000 \
        -not -path "$folder/tmp/*" -not -path "$folder/var/lib/kvarena/*" -not -path "$folder/var/cache/huggingface/*")
    [[ -z $written ]] || fail "$service wrote into its root: ${written//$folder/}"
}

stop_all() {
    local service
    for service in "${!containers[@]}"; do
        if [[ $builder == buildah ]]; then
            kill "${processes[$service]}" 2>/dev/null || true
            wait "${processes[$service]}" 2>/dev/null || true
            buildah rm "${containers[$service]}" >/dev/null
        else
            "$builder" rm --force "${containers[$service]}" >/dev/null 2>&1 || true
        fi
        unset "containers[$service]" "processes[$service]"
    done
}

# A completion of the town model; its answer is printed and must have tokens.
ask() {
    local offset=${health[$1]%%/*} answer
    local chunk='The baker of the town is called Anna Berg. She lives in the house beside the river and sells bread.'
    answer=$(curl --silent --show-error --fail --max-time 120 "$(url "$offset/v1/completions")" \
        -H 'content-type: application/json' \
        -d "{\"model\": \"town\", \"prompt\": \"<note>$chunk<note>$chunk Who is the baker?\", \"max_tokens\": 4, \"temperature\": 0}")
    grep -qE '"completion_tokens": ?[1-4]' <<<"$answer" || fail "$1 gave no tokens: $answer"
    printf '%s\n' "$answer"
}

try_image() {
    local image=$1 service
    for service in ${services[$image]}; do
        start "$image" "$service"
        wait_until_healthy "$service"
        printf '%s: healthy' "$service"
        case $service in
            lmcache-server) ;;
            page)
                curl --silent --fail --max-time 10 "$(url 501/)" | grep -q '<div id="root">' || fail "the page is not there"
                printf ', shows the page'
                ;;
            blend)
                ask blend >/dev/null
                ask blend | grep -qE '"store_hits": ?[1-9]' || fail "blend took nothing from LMCache: $(tail -n 15 "$logs/blend")"
                printf ', answers with chunks from LMCache'
                ;;
            *)
                ask "$service" >/dev/null
                printf ', answers'
                ;;
        esac
        check_rights "$service"
        printf '\n'
        [[ $service == lmcache-server || $service == blend ]] || stop_all  # lmcache needs the server too
    done
}

[[ $# -gt 0 ]] || set -- cpu engines page
for image in "$@"; do
    [[ -n ${services[$image]:-} ]] || fail "no image '$image' to try; choose from cpu, engines, page"
done
builder=$(find_builder)
trap stop_all EXIT
for image in "$@"; do
    printf '== trying kvarena-%s with %s\n' "$image" "$builder"
    try_image "$image"
done
