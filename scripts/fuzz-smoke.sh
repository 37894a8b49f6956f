#!/usr/bin/env bash
# A short run of every fuzz target, from seeds made of the fixtures. Needs a nightly compiler and
# cargo-fuzz; without a nightly it says so and stops. SECONDS_EACH sets the length (default 20).
set -euo pipefail
cd "$(dirname "$0")/.."
nightly=$(rustup toolchain list 2>/dev/null | grep -o '^nightly[^ ]*' | head -n 1 || true)
if [ -z "$nightly" ]; then
    echo "SKIPPED: fuzz smoke needs a nightly compiler (rustup toolchain install nightly)"
    exit 0
fi
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
seconds=${SECONDS_EACH:-20}

mkdir -p fuzz/corpus/{gguf,checkpoint,tokenizer}
cp fixtures/goldens/bitnet-tiny/model-i2_s.gguf fuzz/corpus/gguf/
cp fixtures/goldens/gguf-bitnet-silu/model-tq2_0.gguf fuzz/corpus/gguf/
cp fixtures/goldens/bitnet-tiny/packed_multiply/{config.json,tokenizer_config.json} fuzz/corpus/checkpoint/
cp fixtures/goldens/bitnet-tiny/packed_multiply/tokenizer.json fuzz/corpus/tokenizer/

for target in gguf checkpoint tokenizer; do
    echo "-- $target, $seconds seconds"
    cargo "+$nightly" fuzz run --sanitizer none "$target" -- \
        -max_total_time="$seconds" -rss_limit_mb=1024 -timeout=10 -max_len=700000 -print_final_stats=1
done
