#!/usr/bin/env bash
# Type-checks and lints, for x86_64-pc-windows-msvc, what is built otherwise there: memory, threads,
# mapped files, wgpu's DX12 and where the engine chooses a device. Nothing is linked, so neither
# Windows nor a file of Microsoft's is needed.
#
#   scripts/check-windows.sh
#
# Needs a standard library for the target, as scripts/check-macos.sh does; where it is missing the script
# says so and skips; with BITNET_REQUIRE_WINDOWS=1 that is an error.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "SKIPPED: the code for Windows was not checked: $1" >&2
    [ "${BITNET_REQUIRE_WINDOWS:-}" = 1 ] && exit 1
    exit 0
}

. scripts/std-source.sh
cross_clippy x86_64-pc-windows-msvc \
    -p bitnet-core -p bitnet-quant -p bitnet-wgpu -p bitnet-inference --features bitnet-inference/wgpu
