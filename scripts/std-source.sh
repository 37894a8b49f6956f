# Finds the standard library's source for -Zbuild-std; to be sourced by scripts that build for a target
# whose standard library is not installed. `std_source` sets __CARGO_TESTS_ONLY_SRC_ROOT from
# BITNET_STD_SOURCE (the archive of the source that matches the nightly toolchain, or its unpacked
# `library` folder), or calls the script's `skip` with the reason.
std_source() {
    local target=$1 source=${BITNET_STD_SOURCE:-} nightly wanted folder
    [ -n "$source" ] ||
        skip "no standard library for $target: run 'rustup target add $target', or set BITNET_STD_SOURCE"
    nightly=$(rustc +nightly --version 2>/dev/null) || skip "there is no nightly toolchain"
    if [ -f "$source" ]; then
        # Sources match within a minor version: 1.97.1 builds with a nightly 1.97.0.
        wanted=$(sed -nE 's/.*[^0-9]([0-9]+\.[0-9]+)\.[0-9]+\.tar.*/\1/p' <<<"$source")
        case $nightly in
            "rustc $wanted."*) ;;
            *) skip "the source is of $wanted, but the toolchain is $nightly" ;;
        esac
        folder=${CARGO_TARGET_DIR:-target}/std-source-$wanted
        if [ ! -d "$folder/library" ]; then
            mkdir -p "$folder"
            tar -xf "$source" -C "$folder"
        fi
        source=$folder/library
    fi
    [ -f "$source/std/Cargo.toml" ] || skip "$source is not the standard library's source"
    __CARGO_TESTS_ONLY_SRC_ROOT=$(realpath "$source")
    export __CARGO_TESTS_ONLY_SRC_ROOT
}

# Lints libraries for a target, with its installed standard library or one built from source.
cross_clippy() {
    local target=$1
    shift
    local arguments=(clippy --lib --target "$target" "$@")
    if [ -d "$(rustc --print sysroot)/lib/rustlib/$target" ]; then
        cargo "${arguments[@]}" -- -D warnings
        return
    fi
    std_source "$target"
    cargo +nightly "${arguments[@]}" -Zbuild-std=std,panic_unwind -- -D warnings
}
