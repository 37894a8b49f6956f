#!/usr/bin/env bash
# Opt-in: models that `bitnet train` and `bitnet distill` wrote are loaded by transformers, whose logits
# must be ours. Trains for about a minute. Makes a virtual environment in CACHE (default: the user's
# cache directory) with 1 GB of packages; BITNET_TEST_PYTHON names another.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-tests}
python=${BITNET_TEST_PYTHON:-$cache/python/bin/python}
if [ ! -e "$python" ]; then
    python3 -m venv "$cache/python"
    "$python" -m pip install -q torch transformers accelerate gguf safetensors tokenizers numpy jinja2
fi
cargo build -p bitnet-cli
bitnet=${CARGO_TARGET_DIR:-target}/debug/bitnet
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Any text will do: the project's own documents.
text=(README.md ARCHITECTURE.md docs/formats.md)
"$bitnet" -q tokenizer train "${text[@]}" --out "$work/tokenizer" --vocab-size 512
common=(--tokenizer "$work/tokenizer" --steps 40 --window 64 --rows 4 --export hf --export masters)
small=(--preset 1m --vocab-size 512)
"$bitnet" -q train "${text[@]}" --out "$work/relu2" "${common[@]}" "${small[@]}"
"$bitnet" -q train "${text[@]}" --out "$work/silu" "${common[@]}" "${small[@]}" --hidden-act silu
"$bitnet" -q train "${text[@]}" --out "$work/llama" "${common[@]}" "${small[@]}" --family llama
"$bitnet" -q train "${text[@]}" --out "$work/float" "${common[@]}" "${small[@]}" --family llama --float
"$bitnet" -q distill "$work/float/model" "${text[@]}" --out "$work/student" --steps 20 --window 64 --rows 4
"$python" scripts/conversions/check_transformers.py "$bitnet" \
    "$work/relu2/model" "$work/relu2/masters" "$work/silu/model" "$work/llama/model" \
    "$work/llama/masters" "$work/float/model" "$work/student/model"
"$python" - "$work/relu2" README.md <<'PYTHON'
"""The tokenizer that was trained gives the same ids in the Python package."""
import json, pathlib, sys
from transformers import AutoTokenizer
run, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(f"{run}/model")
ids = tokenizer(pathlib.Path(text).read_text(), add_special_tokens=False)["input_ids"]
file = next(pathlib.Path(f"{run}/tokens").glob("README*.tokens")).read_bytes()
ours = memoryview(file[8:]).cast("I")[: len(ids) - 8].tolist()
# All of the file but its end: a document's last line break is not trained on.
assert ours == ids[: len(ours)], "token ids differ"
print(f"{len(ours)} token ids agree")
PYTHON
