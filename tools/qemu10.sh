#!/bin/bash
# Puts Debian 13's qemu-img, version 10, beside the machine's own, as the peer that the converter is measured with:
#
#   .cache/tools/qemu10                   the packages, unpacked; nothing is installed
#   .cache/tools/bin/qemu-img-10          runs it with its own libraries
#
# It fails where it cannot be had; the bench then takes the machine's qemu-img.
set -euo pipefail

readonly suite=trixie

say() { echo "qemu10: $*" >&2; }
fail() {
    say "$*"
    exit 1
}

cache=$(dirname "$(cd "$(dirname "$0")" && pwd)")/.cache/tools
mkdir -p "$cache/bin"
exec 9> "$cache/lock"
flock 9
wrapper=$cache/bin/qemu-img-10
[ ! -x "$wrapper" ] || exit 0

command -v mmdebstrap > /dev/null || fail "mmdebstrap is missing; run 'make deps-demo'"
# The archive that this machine itself uses, with another suite. apt-get expands the $(...) of its format itself.
# shellcheck disable=SC2016
archive=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' \
    'Component: main' | sort -u | head -n 1) || true
[ -n "$archive" ] || fail "apt knows no Debian archive; run 'apt-get update' on a Debian machine"

say "unpacking the qemu-img of Debian $suite ..."
build=$(mktemp -d "$cache/qemu10-XXXXXX")
trap 'rm -rf "$build"' EXIT
# Unpacked into a tar first: as another user than root it happens in a namespace, whose files would not be ours.
mmdebstrap --quiet --variant=extract --include=qemu-utils --aptopt='APT::Install-Recommends false' \
    --aptopt='Acquire::Languages none' $suite "$build/tree.tar" "deb $archive $suite main" ||
    fail "the packages of Debian $suite cannot be had from the archive of this machine"
mkdir "$build/tree"
tar -C "$build/tree" --no-same-owner --exclude='./dev/*' -xf "$build/tree.tar"

# The loader's name and place differ between architectures.
loader=$(cd "$build/tree" && find usr/lib -name 'ld-linux*.so.*' | sort | head -n 1)
[ -n "$loader" ] || fail "the unpacked packages have no loader"
rm -rf "$cache/qemu10"
mv "$build/tree" "$cache/qemu10"
cat > "$wrapper.part" << WRAPPER
#!/bin/sh
tree=\${0%/*}/../qemu10
exec "\$tree/$loader" --library-path "\$tree/${loader%/*}" "\$tree/usr/bin/qemu-img" "\$@"
WRAPPER
chmod +x "$wrapper.part"
version=$("$wrapper.part" --version) || fail "the unpacked qemu-img does not run here"
mv "$wrapper.part" "$wrapper"
say "${version%%$'\n'*}"
