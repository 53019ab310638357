#!/bin/bash
# Fuzzes the targets of fuzz/ one after the other and holds what was found against qemu-img: fuzz.sh SECONDS TOOLS_BIN.
# FUZZ_TARGETS names the targets, all by default; FUZZ_CORPUS the folder for what is found, fuzz/found by default, so that the
# committed corpus stays as it is. FUZZ_ORACLE=no leaves qemu-img out.
set -euo pipefail

seconds=$1
PATH=$(realpath "$2"):$PATH
cd "$(dirname "$0")/../fuzz"
found=${FUZZ_CORPUS:-$PWD/found}
: "${CARGO_TARGET_DIR:=}"
fuzz_dir=${CARGO_TARGET_DIR:+--target-dir $CARGO_TARGET_DIR/fuzz}
read -ra targets <<< "${FUZZ_TARGETS:-$(cargo +nightly fuzz list | grep -v squeeze | tr '\n' ' ')}"

for target in "${targets[@]}"; do
    mkdir -p "$found/$target" "artifacts/$target"
    # Our code has no unsafe blocks, so that an address sanitizer would find nothing in it and cost two thirds of the speed.
    # shellcheck disable=SC2086 # an option and its value, or nothing
    cargo +nightly fuzz run --sanitizer none $fuzz_dir "$target" "$found/$target" "corpus/$target" -- \
        -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1
done

[ "${FUZZ_ORACLE:-yes}" = yes ] || exit 0
cd .. && DVCR_FUZZ_CORPUS=$found cargo test --locked -p dvcr-converter --test corpus
