#!/usr/bin/env bash
# Type-checks and lints, for aarch64-apple-darwin, what is built on macOS only: Metal's host code in
# bitnet-metal, and where the engine chooses and opens it. Nothing is linked, so no Mac and none of
# Apple's files are needed.
#
#   scripts/check-macos.sh
#
# Needs a standard library for the target: either `rustup target add aarch64-apple-darwin`, or
# BITNET_STD_SOURCE, which is then built with -Zbuild-std (see scripts/std-source.sh). Where it is missing
# the script says so and skips; with BITNET_REQUIRE_MACOS=1 that is an error.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "SKIPPED: the code for macOS was not checked: $1" >&2
    [ "${BITNET_REQUIRE_MACOS:-}" = 1 ] && exit 1
    exit 0
}

. scripts/std-source.sh
cross_clippy aarch64-apple-darwin -p bitnet-metal -p bitnet-inference
