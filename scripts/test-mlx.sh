#!/usr/bin/env bash
# Builds mlx-c for MLX on this machine's CPU and runs every MLX test: the library's own, the
# conformance suite, and whole models through the engine and the program.
#
#   scripts/test-mlx.sh                  all of it
#   eval "$(scripts/test-mlx.sh env)"    only the library; sets the variables to use it by hand
#   scripts/test-mlx.sh build            builds the library anew
#
# On macOS with Homebrew's mlx-c the tests need no building: run them with BITNET_MLX_LIBRARY set.
# Needs python3, a C++ compiler and the package indexes; everything is kept under
# ${XDG_CACHE_HOME:-~/.cache}/bitnet-mlx.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$PWD

mlx_version=0.32.2     # what the function table of bitnet-mlx is written for
mlx_c_crate=0.7.0      # the release of the crate mlx-sys whose mlx-c belongs to it
cache="${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-mlx/$mlx_version-$mlx_c_crate"
library="$cache/build/libmlxc.so"

build() {
    mkdir -p "$cache/source/src"
    [ -x "$cache/venv/bin/python" ] || python3 -m venv "$cache/venv"
    "$cache/venv/bin/pip" install --quiet --disable-pip-version-check \
        "mlx[cpu]==$mlx_version" cmake ninja
    # mlx-c's source travels in a crate; fetching needs a package that names it.
    cat > "$cache/source/Cargo.toml" <<TOML
[package]
name = "source-of-mlx-c"
version = "0.0.0"
edition = "2024"
[dependencies]
mlx-sys = "=$mlx_c_crate"
[workspace]
TOML
    touch "$cache/source/src/lib.rs"
    local source
    source=$(cargo metadata --quiet --format-version 1 --manifest-path "$cache/source/Cargo.toml" |
        "$cache/venv/bin/python" -c 'import json, os, sys
print(*[os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "mlx-sys"])')
    export PATH="$cache/venv/bin:$PATH"
    nice -n 19 cmake -S "$source/src/mlx-c" -B "$cache/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=ON -DMLX_C_USE_SYSTEM_MLX=ON -DMLX_C_BUILD_EXAMPLES=OFF \
        -DMLX_DIR="$("$cache/venv/bin/python" -c 'import mlx.core, os
print(os.path.dirname(mlx.core.__file__))')/share/cmake/MLX" \
        -DCMAKE_CXX_FLAGS="-include $tree/scripts/mlx/format.h" > "$cache/cmake.log"
    nice -n 19 ninja -C "$cache/build" > "$cache/ninja.log" || { tail -n 20 "$cache/ninja.log"; exit 1; }
}

skip() {
    echo "SKIPPED, the MLX backend was not tested: $1" >&2
    exit 0
}
if [ "${1:-}" = build ]; then
    build
    exit
fi
[ "$(uname -s)" = Linux ] || skip "this builds mlx-c for Linux; elsewhere name its file and run cargo test"
if [ ! -f "$library" ]; then
    for tool in python3 c++; do
        command -v "$tool" > /dev/null || skip "building mlx-c needs $tool"
    done
    glibc=$(getconf GNU_LIBC_VERSION 2> /dev/null | cut -d' ' -f2)
    [ "$(printf '%s\n' 2.35 "${glibc:-0}" | sort -V | head -n 1)" = 2.35 ] ||
        skip "MLX's packages need glibc 2.35, this is ${glibc:-another C library}"
    # In a process of its own, so that it ends at the first error.
    "$0" build >&2 || skip "mlx-c could not be built"
fi
mlx_folder=$(echo "$cache"/venv/lib/python3*/site-packages/mlx/lib)
export BITNET_MLX_LIBRARY="$library"
export LD_LIBRARY_PATH="$mlx_folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
if [ "${1:-}" = env ]; then
    echo "export BITNET_MLX_LIBRARY='$BITNET_MLX_LIBRARY' LD_LIBRARY_PATH='$LD_LIBRARY_PATH'"
    exit
fi

. scripts/devices.sh
echo "-- conformance; evaluations and bytes of a token; a compiled token; a lost device"
device_tests --test on_mlx --test model_on_mlx -- --include-ignored --nocapture
echo "-- reference models: logits, greedy tokens, chunks, batches"
reference_models mlx
echo "-- the library, requests served together"
device_tests --lib -- --include-ignored mlx_tests array:: library::
echo "-- the program"
program mlx
