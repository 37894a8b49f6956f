#!/usr/bin/env bash
# Checks the memory pool under every interleaving of threads that share it (loom). Builds
# bitnet-core apart from the rest, since `--cfg loom` concerns every crate.
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTFLAGS="${RUSTFLAGS:-} --cfg loom" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom"
export LOOM_MAX_PREEMPTIONS="${LOOM_MAX_PREEMPTIONS:-3}"
cargo test --release -p bitnet-core --test memory_loom
