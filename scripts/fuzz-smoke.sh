#!/usr/bin/env bash
# A short run of every fuzz target, from seeds made of the fixtures. Needs a nightly compiler and
# cargo-fuzz (installed here if it is missing); without a nightly it says so and stops.
# SECONDS_EACH sets the length of each run (default 20).
set -euo pipefail
cd "$(dirname "$0")/.."
nightly=$(rustup toolchain list 2>/dev/null | grep -o '^nightly[^ ]*' | head -n 1 || true)
if [ -z "$nightly" ]; then
    echo "SKIPPED: fuzz smoke needs a nightly compiler (rustup toolchain install nightly)"
    exit 0
fi
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
seconds=${SECONDS_EACH:-20}
tiny=fixtures/goldens/bitnet-tiny

little_endian() { # a number as 4 bytes, lowest first
    for shift in 0 8 16 24; do printf "\\x$(printf %02x $((($1 >> shift) & 255)))"; done
}

mkdir -p fuzz/corpus/{gguf,checkpoint,tokenizer,chat_template}
cp $tiny/model-i2_s.gguf fuzz/corpus/gguf/
cp fixtures/goldens/gguf-bitnet-silu/model-tq2_0.gguf fuzz/corpus/gguf/
for form in packed_multiply packed_divide; do
    folder=$tiny/$form
    {
        little_endian "$(stat -c %s $folder/config.json)"
        little_endian "$(stat -c %s $folder/tokenizer_config.json)"
        cat $folder/config.json $folder/tokenizer_config.json $folder/model.safetensors
    } >fuzz/corpus/checkpoint/$form
done
cp $tiny/packed_multiply/tokenizer.json fuzz/corpus/tokenizer/
cp fuzz/seeds/chat_template/* fuzz/corpus/chat_template/

smoke() { # target, longest input
    echo "-- $1, $seconds seconds"
    cargo "+$nightly" fuzz run --sanitizer none "$1" -- \
        -max_total_time="$seconds" -max_len="$2" -rss_limit_mb=1024 -timeout=10 -verbosity=0 -print_final_stats=1
}
smoke gguf 200000
smoke checkpoint 260000
smoke tokenizer 20000
smoke chat_template 4000
