#!/usr/bin/env bash
# Runs the tests of bitnet-core for aarch64 under qemu, so that the NEON kernels are tested on an
# x86-64 machine too. Further arguments go to `cargo test`.
#
#   scripts/test-aarch64.sh [cargo test arguments]
#
# Needs qemu-user and the cross linker (Debian: qemu-user gcc-aarch64-linux-gnu
# libc6-dev-arm64-cross), and a standard library for the target: either
# `rustup target add aarch64-unknown-linux-gnu`, or BITNET_STD_SOURCE, the archive (or unpacked
# `library` folder) of the standard library's source that matches the nightly toolchain, which is
# then built with -Zbuild-std. Where something is missing the script says what and skips; with
# BITNET_REQUIRE_AARCH64=1 that is an error.
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu

skip() {
    echo "SKIPPED: aarch64 tests did not run: $1" >&2
    [ "${BITNET_REQUIRE_AARCH64:-}" = 1 ] && exit 1
    exit 0
}

command -v qemu-aarch64 >/dev/null || skip "qemu-aarch64 is not installed (Debian: qemu-user)"
command -v aarch64-linux-gnu-gcc >/dev/null ||
    skip "aarch64-linux-gnu-gcc is not installed (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross)"

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
# `max` has dotprod and i8mm, so every set of kernels runs.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu max"

arguments=(test -p bitnet-core --target "$target" "$@")

if [ -d "$(rustc --print sysroot)/lib/rustlib/$target" ]; then
    exec cargo "${arguments[@]}"
fi

source=${BITNET_STD_SOURCE:-}
[ -n "$source" ] ||
    skip "no standard library for $target: run 'rustup target add $target', or set BITNET_STD_SOURCE"
nightly=$(rustc +nightly --version 2>/dev/null) || skip "there is no nightly toolchain"
if [ -f "$source" ]; then
    # Sources match within a minor version: 1.97.1 builds with a nightly 1.97.0.
    wanted=$(sed -nE 's/.*[^0-9]([0-9]+\.[0-9]+)\.[0-9]+\.tar.*/\1/p' <<<"$source")
    case $nightly in
        "rustc $wanted."*) ;;
        *) skip "the source is of $wanted, but the toolchain is $nightly" ;;
    esac
    folder=${CARGO_TARGET_DIR:-target}/std-source-$wanted
    if [ ! -d "$folder/library" ]; then
        mkdir -p "$folder"
        tar -xf "$source" -C "$folder"
    fi
    source=$(realpath "$folder/library")
fi
[ -f "$source/std/Cargo.toml" ] || skip "$source is not the standard library's source"

export __CARGO_TESTS_ONLY_SRC_ROOT=$source
exec cargo +nightly "${arguments[@]}" -Zbuild-std=std,panic_unwind
