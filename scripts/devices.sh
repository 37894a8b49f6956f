# What the checks of several devices share; to be sourced.

# Tests of a build with every device that is opened at run time. One build for all of them, and of the
# whole workspace, so that dependencies are built as for `cargo test --workspace`.
device_tests() {
    cargo test --workspace --features bitnet-cli/wgpu,bitnet-cli/mlx "$@"
}

# The reference models on the device $1: logits, greedy tokens, prompts whole and in chunks, batches.
reference_models() {
    BITNET_DEVICE=$1 device_tests --test goldens -- --skip gradients
}

# `bitnet run --device $1`, a process as a user would start it, against the CPU's tokens.
program() {
    BITNET_REQUIRE_DEVICES=$1 device_tests --test devices -- --nocapture
}
