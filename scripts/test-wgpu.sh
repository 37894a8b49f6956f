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
# From here on a device that is missing is a failure.
export BITNET_REQUIRE_WGPU=1
# Mesa would look for a display to choose a device by, and complain that there is none.
export NODEVICE_SELECT=1

echo "-- conformance, shaders"
cargo test -p bitnet-wgpu
echo "-- a device lost in mid-request, submissions of a token"
cargo test -p bitnet-inference --features wgpu --lib wgpu
echo "-- reference models: logits, greedy tokens, chunks, batches"
BITNET_DEVICE=wgpu cargo test -p bitnet-inference --features wgpu --test goldens
echo "-- the program"
cargo build -q -p bitnet-cli --features wgpu
bitnet=${CARGO_TARGET_DIR:-target}/debug/bitnet
"$bitnet" devices
story() { "$bitnet" run "Once upon a time" --greedy --max-tokens 48 --device "$1" -v; }
of_cpu=$(story cpu 2>/dev/null)
of_wgpu=$(story wgpu 2>/tmp/bitnet-wgpu-$$.log) || { cat /tmp/bitnet-wgpu-$$.log; exit 1; }
grep "builtin on wgpu" /tmp/bitnet-wgpu-$$.log
rm /tmp/bitnet-wgpu-$$.log
[ "$of_cpu" = "$of_wgpu" ] || {
    printf 'the CPU tells:\n%s\nwgpu tells:\n%s\n' "$of_cpu" "$of_wgpu"
    exit 1
}
echo "wgpu tells the CPU's story"
