#!/bin/bash
# Installs the Debian packages that the named purposes need and this machine lacks: tools/deps.sh PURPOSE...
#
#   build   compile the workspace
#   demo    build a Debian image, import it, boot it
#   test    the end-to-end tests: image tools and registry clients of others
#   tools   Go, and Python's environments, when there are none at all, for tools/build.sh
#   lint    the shell checker
#   bench   programs of others that move disks, to be measured beside
#
# Nothing is done, and no root asked for, when all are there.
set -euo pipefail

say() { echo "deps: $*" >&2; }

declare -A packages=(
    # A C compiler for the crates that bring C: zstd, liblzma, the TLS library.
    [build]="gcc libc6-dev"
    # seabios is only recommended by qemu-system-x86, but nothing boots without it.
    [demo]="ca-certificates e2fsprogs fdisk grub-pc-bin mmdebstrap qemu-system-x86 qemu-utils seabios skopeo uidmap util-linux"
    [test]="buildah bzip2 curl fdisk grub-rescue-pc jq lz4 mount nbdkit openssl umoci xfsprogs xorriso xz-utils zstd"
    [tools]=""
    [lint]="shellcheck"
    [bench]="e2fsprogs libnbd-bin nbdkit openssl qemu-utils"
)

has_go() {
    local candidate
    for candidate in go /usr/local/go/bin/go; do
        command -v $candidate > /dev/null && return
    done
    return 1
}
# Any Go will do: one that is too old fetches a newer one.
has_go || packages[tools]="golang-go"
python3 -c "import ensurepip, venv" 2> /dev/null || packages[tools]+=" python3-venv"

wanted=()
for purpose in "$@"; do
    [ -n "${packages[$purpose]+known}" ] || {
        say "there is no purpose '$purpose'; choose from: ${!packages[*]}"
        exit 1
    }
    read -ra more <<< "${packages[$purpose]}"
    wanted+=("${more[@]}")
done

if ! command -v dpkg-query > /dev/null; then
    say "this is not a Debian system; going on in the hope that what these packages hold is there: ${wanted[*]}"
    exit 0
fi

missing=()
for package in "${wanted[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null) || true
    [ "$status" = installed ] || missing+=("$package")
done
# The image is built from the archives that apt knows, so their lists have to be there.
# apt-get expands the $(...) of its format itself.
# shellcheck disable=SC2016
lists=$(apt-get indextargets --format '$(FILENAME)' 'Created-By: Packages' 'Origin: Debian' 'Component: main' 2> /dev/null) || true
[ ${#missing[@]} -gt 0 ] || [[ " $* " == *" demo "* && -z $lists ]] || exit 0

as_root=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo > /dev/null || {
        say "as root, please run: apt-get install --no-install-recommends ${missing[*]}"
        exit 1
    }
    as_root=(sudo)
fi
say "updating apt's lists${as_root:+ (with sudo)}"
"${as_root[@]}" apt-get update -qq
if [ ${#missing[@]} -gt 0 ]; then
    say "installing Debian packages${as_root:+ (with sudo)}: ${missing[*]}"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" > /dev/null
fi
