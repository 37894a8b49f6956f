#!/usr/bin/env bash
# Runs the Metal kernels on the CPU: their text, compiled by clang++ with a stand-in for Metal's
# standard library (crates/bitnet-metal/harness), under the host code that runs them on a Mac. They must
# have the bits of the CPU's scalar code, and faults planted in them must be found.
#
#   scripts/test-metal.sh [names of tests]
#
# Needs clang++ 15 or later, and installs Debian's clang-19 where it is root; without one it says so and
# skips. With BITNET_REQUIRE_METAL_TEST=1 that is an error. BITNET_CLANG names a compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

works() { # a compiler that has 16-bit floats and address spaces
    printf '_Float16 x; __attribute__((address_space(3))) int* p;' | "$@" -x c++ -fsyntax-only - 2>/dev/null
}

find_compiler() {
    for name in clang++-19 clang++-20 clang++-18 clang++-17 clang++-16 clang++-15 clang++; do
        if command -v "$name" >/dev/null && works "$name"; then
            BITNET_CLANG=$name
            return
        fi
    done
}

[ -n "${BITNET_CLANG:-}" ] || find_compiler
if [ -z "${BITNET_CLANG:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    (apt-get update -qq && apt-get install -y -qq --no-install-recommends clang-19) >/dev/null 2>&1 ||
        echo "clang-19 could not be installed" >&2
    find_compiler
fi
if [ -z "${BITNET_CLANG:-}" ]; then
    echo "SKIPPED: the Metal kernels did not run: there is no clang++ 15 or later (Debian: clang-19)" >&2
    [ "${BITNET_REQUIRE_METAL_TEST:-}" = 1 ] && exit 1
    exit 0
fi
export BITNET_CLANG
echo "compiler: $BITNET_CLANG"
# Of the whole workspace, so that dependencies are built as for `cargo test --workspace`.
cargo test --workspace --test on_cpu -- --ignored --nocapture "$@"
