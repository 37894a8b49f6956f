#!/usr/bin/env bash
# HTTPS of `bitnet serve`, with a certificate made for this run and curl as the client.
set -euo pipefail
cd "$(dirname "$0")/.."
for need in openssl curl; do
    command -v "$need" > /dev/null || { echo "SKIPPED: HTTPS was not tested: $need is missing"; exit 0; }
done
# Of the whole workspace, so that dependencies are built as for its tests.
cargo build --quiet --workspace --features bitnet-cli/tls --bin bitnet
bitnet="${CARGO_TARGET_DIR:-target}/debug/bitnet"

folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2> /dev/null; rm -r "$folder"' EXIT
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost \
    -addext "subjectAltName=DNS:localhost,IP:127.0.0.1" -keyout "$folder/key" -out "$folder/cert" 2> /dev/null
"$bitnet" serve --port 0 --tls-cert "$folder/cert" --tls-key "$folder/key" --log-format json 2> "$folder/log" &
server=$!
for _ in $(seq 100); do
    url=$(sed -n 's/.*listening on \(https:[^"]*\)".*/\1/p' "$folder/log")
    [ -z "$url" ] || break
    sleep 0.1
done
[ -n "$url" ] || { cat "$folder/log"; exit 1; }

body='{"model": "builtin", "prompt": "Once", "max_tokens": 4, "stream": true}'
# `!` alone would not end the script.
fails() {
    if "$@" 2> /dev/null; then
        echo "FAILED: this should have failed: $*"
        exit 1
    fi
}
ask() { curl --silent --show-error --max-time 60 "$@"; }
ask --cacert "$folder/cert" "$url/v1/completions" -H 'content-type: application/json' -d "$body" | grep -q '^data: \[DONE\]'
echo "ok  an answer streams over HTTPS"
fails ask "$url/health"
echo "ok  a client that does not know the certificate turns away"
fails ask --fail "${url/https/http}/health"
fails ask --tls-max 1.1 --cacert "$folder/cert" "$url/health"
ask --cacert "$folder/cert" "$url/health" | grep -q ok
echo "ok  plain HTTP and old TLS are refused, and the server goes on"
fails "$bitnet" serve --port 0 --tls-cert "$folder/key" --tls-key "$folder/key"
fails "$bitnet" serve --port 0 --tls-cert "$folder/cert"
echo "ok  files that are no certificate, and a certificate without a key, are refused"
kill "$server"
wait "$server"
server=
echo "ok  the server ends when told to"
