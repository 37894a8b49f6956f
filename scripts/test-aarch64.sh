#!/usr/bin/env bash
# Runs the tests of bitnet-core for aarch64 under qemu, so that the NEON kernels are tested on an
# x86-64 machine too. Arguments name tests; without them all run but those of the memory pool, which
# assert times that emulation does not keep.
#
#   scripts/test-aarch64.sh [test name]
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

# Emulating costs more than compiling.
export CARGO_PROFILE_DEV_OPT_LEVEL=2
arguments=(test -p bitnet-core --target "$target")
tests=("$@")
[ $# -gt 0 ] || tests=(--skip memory::)

if [ -d "$(rustc --print sysroot)/lib/rustlib/$target" ]; then
    exec cargo "${arguments[@]}" -- "${tests[@]}"
fi

. scripts/std-source.sh
std_source "$target"
exec cargo +nightly "${arguments[@]}" -Zbuild-std=std,panic_unwind -- "${tests[@]}"
