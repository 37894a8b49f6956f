#!/usr/bin/env bash
# The server's tests of hostile input with crowds of the size that attackers have: thousands of idle
# connections, of different schemas, of requests broken off. Takes some minutes; `cargo test` does the
# same with small crowds.
#
#   scripts/test-hostile.sh [FILTER]
set -euo pipefail
cd "$(dirname "$0")/.."

# Server and clients are one process: two descriptors a connection.
ulimit -n "$(ulimit -Hn)" 2> /dev/null || true
if [ "$(ulimit -n)" != unlimited ] && [ "$(ulimit -n)" -lt 20000 ]; then
    echo "SKIPPED: 9,000 connections need 20,000 file descriptors, and $(ulimit -n) are allowed"
    exit 0
fi
export BITNET_HOSTILE=heavy
cargo test --workspace --test hostile --test hostile_fields --test hostile_connections --test structured -- "$@"
