# Sourced by build.sh and try.sh: what builds and starts containers on this machine.
# shellcheck shell=bash

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# BUILDER, or the first of docker, buildah and podman that works here.
find_builder() {
    local candidate
    for candidate in ${BUILDER:-docker buildah podman}; do
        case $candidate in
            docker | buildah | podman) if "$candidate" info >/dev/null 2>&1; then echo "$candidate" && return; fi ;;
            *) fail "BUILDER must be one of docker, buildah, podman, not '$candidate'" ;;
        esac
    done
    fail "${BUILDER:-none of docker, buildah and podman} does not work here; on Debian, as root: apt-get install buildah debootstrap"
}
