#!/bin/bash
# Builds the programs that the tests compare with or are judged by, into .cache/tools/bin:
#
#   crane             a registry client (github.com/google/go-containerregistry)
#   registry          CNCF distribution v3
#   docker-registry   distribution 2.8, from Debian's package
#   conformance.test  the conformance program of the OCI distribution specification
#   oras              a client for artifacts (oras.land/oras)
#   helm              the package manager of Kubernetes
#   cosign            a client that signs images (sigstore)
#   containerd, ctr   a container runtime and its client, from Debian's package
#   minio             an S3 server
#   moto_server       a stand-in for S3, in Python, from PyPI
#   tuspy-python      a Python that has tuspy, a client of the tus protocol, from PyPI
#
# Each Go program has its own module here, so that one's dependencies never change the other's. Versions and checksums are
# pinned by go.mod and go.sum; a program is built again only when one of these changes.
set -euo pipefail

# What the modules ask for, and what is fetched when this machine's Go is older.
readonly go_minor_min=26
readonly go_toolchain=go1.26.8

say() { echo "tools: $*" >&2; }
fail() {
    say "$*"
    exit 1
}

here=$(cd "$(dirname "$0")" && pwd)
cache=$(dirname "$here")/.cache/tools
mkdir -p "$cache/bin" "$cache/stamps"
exec 9> "$cache/lock"
flock 9

# Prints the minor version of a Go command: 26 for go1.26.8. Its own directory has no go.mod to switch toolchains for.
go_minor() {
    (cd / && GOTOOLCHAIN=local "$1" version) | sed -nE 's/^go version go1\.([0-9]+).*/\1/p'
}

new_enough() {
    local minor
    minor=$(go_minor "$1") && [ -n "$minor" ] && [ "$minor" -ge $go_minor_min ]
}

# Chooses a Go command: the one of this machine, or else a newer toolchain that it fetches as a Go module.
find_go() {
    local name candidate old=""
    for name in go /usr/local/go/bin/go /usr/lib/go/bin/go "$cache/go/bin/go"; do
        candidate=$(command -v "$name") || continue
        if new_enough "$candidate"; then
            go=$candidate
            return
        fi
        old=$candidate
    done
    [ -n "$old" ] || fail "there is no Go; run 'make deps-tools', or install Go 1.$go_minor_min from go.dev/dl"
    fetch_toolchain "$old"
    go=$cache/go/bin/go
}

fetch_toolchain() {
    local platform module unpacked
    platform=$("$1" env GOOS)-$("$1" env GOARCH)
    module=golang.org/toolchain@v0.0.1-$go_toolchain.$platform
    say "$1 is older than Go 1.$go_minor_min: fetching $go_toolchain through the Go module proxy"
    (cd / && "$1" mod download "$module") ||
        fail "cannot fetch $module; install Go 1.$go_minor_min from go.dev/dl and put it on PATH"
    unpacked=$("$1" env GOMODCACHE)/$module
    rm -rf "$cache/go.part" "$cache/go"
    cp -r --no-preserve=mode "$unpacked" "$cache/go.part"
    # A module holds no executables, so their mode is restored here.
    chmod +x "$cache"/go.part/bin/* "$cache/go.part/pkg/tool/${platform/-/_}"/*
    mv "$cache/go.part" "$cache/go"
}

# Builds one program when its pins changed since the last time: build MODULE PROGRAM PACKAGE GO-COMMAND...
build() {
    local module=$1 program=$2 package=$3 stamp started=$SECONDS
    shift 3
    stamp=$(cat "$here/$module/go.mod" "$here/$module/go.sum" | sha256sum | cut -c1-16)
    if [ -x "$cache/bin/$program" ] && [ "$(cat "$cache/stamps/$program" 2> /dev/null)" = "$stamp" ]; then
        return
    fi
    [ -n "${go:-}" ] || find_go
    say "building $program ..."
    (cd "$here/$module" && GOTOOLCHAIN=local GOFLAGS=-buildvcs=false CGO_ENABLED=0 \
        "$go" "$@" -o "$cache/bin/$program.part" "$package")
    mv "$cache/bin/$program.part" "$cache/bin/$program"
    echo "$stamp" > "$cache/stamps/$program"
    say "built $program: $((SECONDS - started)) s"
}

# Debian's servers are unpacked rather than installed: installing them starts services on the machine.
unpack() {
    local package=$1 program dir
    shift
    for program in "$@"; do
        [ -x "$cache/bin/$program" ] || break
    done
    [ ! -x "$cache/bin/$program" ] || return 0
    dir=$(mktemp -d)
    say "unpacking Debian's $package ..."
    # As root, apt would drop its rights and warn that it cannot write here.
    (cd "$dir" && apt-get download -qq -o APT::Sandbox::User=root "$package" && dpkg-deb -x ./*.deb x) ||
        fail "cannot download Debian's $package; run 'apt-get update' and try again"
    for program in "$@"; do
        mv "$dir/x/usr/bin/$program" "$cache/bin/$program"
    done
    rm -r "$dir"
}

# Installs packages of PyPI into an environment of their own, and a command that runs its Python; again only when the pins
# change: install_python ENVIRONMENT COMMAND ARGUMENT...
install_python() {
    local name=$1 command=$2 pins=$here/$1/requirements.txt stamp started=$SECONDS
    shift 2
    stamp=$(sha256sum < "$pins" | cut -c1-16)
    if [ -x "$cache/bin/$command" ] && [ "$(cat "$cache/stamps/$name" 2> /dev/null)" = "$stamp" ] &&
        "$cache/$name/bin/python" -c "" 2> /dev/null; then
        return
    fi
    say "installing $name ..."
    rm -rf "${cache:?}/$name"
    python3 -m venv "$cache/$name" || fail "python3 cannot make environments; run 'make deps-tools'"
    "$cache/$name/bin/python" -m pip install -q --disable-pip-version-check --no-deps -r "$pins" ||
        fail "cannot install the packages of $pins; is PyPI in reach?"
    # The scripts that pip writes name the environment's place; this one goes where the folder goes.
    cat > "$cache/bin/$command" << EOF
#!/bin/sh
exec "\$(dirname "\$(readlink -f "\$0")")/../$name/bin/python" $* "\$@"
EOF
    chmod +x "$cache/bin/$command"
    echo "$stamp" > "$cache/stamps/$name"
    say "installed $name: $((SECONDS - started)) s"
}

unpack docker-registry docker-registry
unpack containerd containerd ctr
build crane crane github.com/google/go-containerregistry/cmd/crane build -trimpath
build registry registry github.com/distribution/distribution/v3/cmd/registry build -trimpath
build conformance conformance.test github.com/opencontainers/distribution-spec/conformance test -c
build oras oras oras.land/oras/cmd/oras build -trimpath
build helm helm helm.sh/helm/v3/cmd/helm build -trimpath
build cosign cosign github.com/sigstore/cosign/v3/cmd/cosign build -trimpath
build minio minio github.com/minio/minio build -trimpath
install_python moto moto_server -m moto.server
install_python tuspy tuspy-python
