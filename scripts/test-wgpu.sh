#!/usr/bin/env bash
# The wgpu backend on this machine's Vulkan device; where a Debian has none, on Mesa's lavapipe, which
# imitates one on the CPU: every kernel in every form, whole models, the program, a device that is lost.
set -euo pipefail
cd "$(dirname "$0")/.."
skip() {
    echo "SKIPPED, the wgpu backend was not tested: $1" >&2
    exit 0
}
drivers() { compgen -G '/usr/share/vulkan/icd.d/*.json' || compgen -G '/etc/vulkan/icd.d/*.json'; }

if ! drivers >/dev/null; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
        skip "there is no Vulkan driver, and apt-get cannot install lavapipe here"
    (apt-get update -qq && apt-get install -y -qq --no-install-recommends \
        mesa-vulkan-drivers libvulkan1) >/dev/null 2>&1 ||
        skip "there is no Vulkan driver, and lavapipe could not be installed"
    drivers >/dev/null || skip "lavapipe was installed, but brought no driver"
fi
# Mesa would look for a display to choose a device by, and complain that there is none.
export NODEVICE_SELECT=1

. scripts/devices.sh
# A driver may be there without a device. With BITNET_REQUIRE_WGPU=1 that is a failure.
device_tests -q --test devices --no-run # builds the program
found=$("${CARGO_TARGET_DIR:-target}/debug/bitnet" devices | grep '^wgpu ')
case "$found" in *"not here: "*)
    [ "${BITNET_REQUIRE_WGPU:-}" = 1 ] && { echo "$found" >&2; exit 1; }
    skip "there is a Vulkan driver, but ${found#*not here: }" ;;
esac
# From here on a device that is missing is a failure.
export BITNET_REQUIRE_WGPU=1

echo "-- conformance: all the device has, the least, split bindings; a lost device"
device_tests --test on_wgpu -- --nocapture
echo "-- a device lost in mid-request, submissions and bytes of a token"
device_tests --test model_on_wgpu -- --nocapture
echo "-- reference models: logits, greedy tokens, chunks, batches"
reference_models wgpu
echo "-- the program"
program wgpu
