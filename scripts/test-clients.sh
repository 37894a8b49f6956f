#!/usr/bin/env bash
# Runs official clients, frameworks and schemathesis against a server of this tree.
#
#   scripts/test-clients.sh              all of them
#   scripts/test-clients.sh light        those that install and run within a few minutes
#   scripts/test-clients.sh openai       Python tests whose name holds this word
#   scripts/test-clients.sh node | schemathesis
#
# Packages go into ${XDG_CACHE_HOME:-~/.cache}/bitnet-clients and are kept. Needs python3 (node and npm
# for `node`) and package indexes; the requests themselves stay on this machine. BITNET names a built
# program; otherwise one is built.
set -euo pipefail
cd "$(dirname "$0")/.."
what="${1:-all}"

skip() {
    echo "SKIPPED: $1"
    exit 0
}
cache="${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-clients"
mkdir -p "$cache"
python="$cache/bin/python"
# Installs what a file lists, all at once or else one by one: a package that cannot be had leaves out its own tests.
install_python() {
    ! cmp -s "scripts/clients/$1" "$cache/$1" || return 0
    local install=("$cache/bin/uv" pip install --quiet --python "$python")
    if "${install[@]}" -r "scripts/clients/$1"; then
        cp "scripts/clients/$1" "$cache/$1"
    else
        grep -v '^#' "scripts/clients/$1" | while read -r package; do
            "${install[@]}" "$package" || echo "SKIPPED: $package cannot be installed"
        done
    fi
}
if [ "$what" != node ]; then
    command -v python3 > /dev/null || skip "the clients' tests need python3"
    [ -x "$python" ] || python3 -m venv "$cache" || skip "python3 cannot make virtual environments"
    # uv resolves in seconds what takes pip many minutes.
    [ -x "$cache/bin/uv" ] || "$cache/bin/pip" install --quiet --disable-pip-version-check uv || skip "no Python package index"
    install_python requirements.txt
    case "$what" in light | schemathesis) ;; *) install_python requirements-frameworks.txt ;; esac
    "$python" -c 'import pytest' || skip "pytest cannot be installed"
fi
node=no
case "$what" in all | light | node)
    if command -v node > /dev/null && command -v npm > /dev/null; then
        node=yes
        if ! cmp -s scripts/clients/package.json "$cache/package.json" || [ ! -d "$cache/node_modules/openai" ]; then
            cp scripts/clients/package.json "$cache/package.json"
            (cd "$cache" && npm install --silent --no-audit --no-fund) || { rm "$cache/package.json"; node=no; }
        fi
    fi
    [ $node = yes ] || echo "SKIPPED: the clients of Node need node, npm and a package index"
    ;;
esac

if [ -z "${BITNET:-}" ]; then
    cargo build --quiet --release -p bitnet-cli
    BITNET="${CARGO_TARGET_DIR:-target}/release/bitnet"
fi
log="$cache/server.log"
"$BITNET" serve --port 0 --log-format json 2> "$log" &
server=$!
trap 'kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true' EXIT
for _ in $(seq 200); do
    BITNET_URL=$(sed -n 's/.*listening on \(http:[^"]*\)".*/\1/p' "$log")
    [ -z "$BITNET_URL" ] || break
    sleep 0.1
done
[ -n "$BITNET_URL" ] || { cat "$log"; exit 1; }
export BITNET_URL LITELLM_LOCAL_MODEL_COST_MAP=True HF_HUB_OFFLINE=1

# Each part runs whatever became of the others.
failed=no
tests() {
    "$python" -m pytest -q -rs -p no:cacheprovider --durations 5 "$@" || failed=yes
}
node_clients() {
    [ $node = no ] || CLIENT_MODULES="$cache/" node scripts/clients/clients.mjs || failed=yes
}
schemathesis() {
    [ -x "$cache/bin/schemathesis" ] || { echo "SKIPPED: schemathesis is not installed"; return 0; }
    # It leaves a folder where it runs.
    (cd "$cache" && bin/schemathesis run "$BITNET_URL/openapi.json" --max-examples "$1" \
        --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
        --phases examples,coverage,fuzzing --suppress-health-check all --seed 1 --workers 2 --no-color) || failed=yes
}
case "$what" in
    all)
        tests scripts/clients
        node_clients
        schemathesis "${EXAMPLES:-30}"
        ;;
    light)
        tests scripts/clients/test_clients.py scripts/clients/test_wire.py
        node_clients
        schemathesis "${EXAMPLES:-5}"
        ;;
    node) node_clients ;;
    schemathesis) schemathesis "${EXAMPLES:-30}" ;;
    *) tests scripts/clients -k "$what" ;;
esac
[ $failed = no ]
