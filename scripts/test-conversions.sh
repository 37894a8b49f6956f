#!/usr/bin/env bash
# Opt-in: what the converters write is read by the Python packages of others: gguf, safetensors,
# tokenizers, and transformers, whose logits must be ours. Makes a virtual environment in CACHE
# (default: the user's cache directory) with 1 GB of packages; BITNET_TEST_PYTHON names another.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-tests}
python=${BITNET_TEST_PYTHON:-$cache/python/bin/python}
if [ ! -e "$python" ]; then
    python3 -m venv "$cache/python"
    "$python" -m pip install -q torch transformers accelerate gguf safetensors tokenizers numpy jinja2
fi
BITNET_TEST_PYTHON=$python cargo test -p bitnet-quant -- --ignored python

cargo build -p bitnet-cli
bitnet=${CARGO_TARGET_DIR:-target}/debug/bitnet
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tiny=fixtures/goldens
"$bitnet" -q convert $tiny/bitnet-tiny/model-i2_s.gguf "$work/from-i2_s"
"$bitnet" -q convert $tiny/bitnet-tiny/packed_multiply "$work/divide" --to hf --scale divide
"$bitnet" -q quantize $tiny/bitnet-tiny/online "$work/quantized"
"$bitnet" -q convert $tiny/llama-ternary-tiny/packed_divide "$work/llama.gguf" --to i2_s
"$bitnet" -q convert "$work/llama.gguf" "$work/llama-through-gguf"
"$bitnet" -q quantize $tiny/llama-ternary-tiny/online "$work/llama-quantized"
"$python" scripts/conversions/check_transformers.py "$bitnet" \
    "$work/from-i2_s" "$work/divide" "$work/quantized" "$work/llama-through-gguf" "$work/llama-quantized"
