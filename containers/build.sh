#!/usr/bin/env bash
# Builds the images. Docker and Podman do it; without them buildah, as root on Debian, in chroots over a base that is
# made here, so that neither an engine nor a registry is needed.
#
#   containers/build.sh [IMAGE ...]      IMAGE: cpu, engines, page (these where none is named), gpu, ai100
#
# BUILDER is docker, buildah or podman; default: the first of them that works here. BASE_IMAGE and BUILD_IMAGE replace
# the images that the Dockerfiles begin with. Where buildah or podman build, pip finds packages as pip on this machine
# does: its configuration is mounted meanwhile, and is no part of the image.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=containers/builder.sh
source "$root/containers/builder.sh"

base=localhost/kvarena-base:bookworm
declare -A dockerfiles=(
    [cpu]=backend/Dockerfile [engines]=backend/Dockerfile.engines [page]=frontend/Dockerfile
    [gpu]=backend/Dockerfile.gpu [ai100]=ai100/Dockerfile
)

# Debian with Python and pip, which the images that a Dockerfile begins with have too.
make_base() {
    buildah inspect --type image "$base" >/dev/null 2>&1 && return
    command -v debootstrap >/dev/null 2>&1 || fail "debootstrap is needed: apt-get install debootstrap, or name a BASE_IMAGE"
    printf '== making %s\n' "$base"
    local folder container
    folder=$(mktemp -d)
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$folder/root" >"$folder/log" 2>&1 ||
        fail "debootstrap failed; its log is $folder/log"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$folder/root" / >/dev/null
    buildah commit --quiet "$container" "$base" >/dev/null
    buildah rm "$container" >/dev/null
    rm -rf "$folder"
}

# pip's configuration files, the folders that they name (of an index in files all of it, and not only its pages), and the
# certificates of this machine.
mounts_for_pip() {
    local path
    for path in /etc/ssl/certs /etc/pip.conf "$HOME/.config/pip/pip.conf" \
        $(python3 -m pip config list 2>/dev/null | grep -oE "/[^ ':]+" | sed 's#^//*#/#; s#/simple/*$##'); do
        if [[ -e $path ]]; then
            printf -- '--volume=%s:%s:ro\n' "$path" "$path"
        fi
    done | sort -u
}

build() {
    local image=$1 name
    local -a command=("$builder" build) options=()
    if [[ $builder == buildah ]]; then
        command=(buildah bud --isolation chroot --format docker --layers)
        if [[ -z ${BASE_IMAGE:-} ]]; then
            make_base
            export BASE_IMAGE=$base BUILD_IMAGE=$base
        fi
    fi
    if [[ $builder != docker ]]; then
        mapfile -t -O "${#options[@]}" options < <(mounts_for_pip)
    fi
    for name in BASE_IMAGE BUILD_IMAGE; do
        if [[ -n ${!name:-} ]] && grep -q "^ARG $name=" "${dockerfiles[$image]}"; then
            options+=(--build-arg "$name=${!name}")
        fi
    done
    printf '== building kvarena-%s with %s\n' "$image" "$builder"
    "${command[@]}" --network host "${options[@]}" -f "${dockerfiles[$image]}" -t "kvarena-$image" .
}

[[ $# -gt 0 ]] || set -- cpu engines page
for image in "$@"; do
    [[ -n ${dockerfiles[$image]:-} ]] || fail "no image '$image'; choose from cpu, engines, page, gpu, ai100"
done
builder=$(find_builder)
cd "$root"
for image in "$@"; do
    build "$image"
done
