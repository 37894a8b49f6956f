#!/usr/bin/env bash
# Runs the official Python clients and schemathesis against a server of this tree.
#
#   scripts/test-clients.sh              all of them
#   scripts/test-clients.sh openai       one: openai anthropic ollama litellm langchain instructor schemathesis
#
# Packages go into a virtual environment under ${XDG_CACHE_HOME:-~/.cache}/bitnet-clients and are kept.
# Needs python3 and a package index; the requests themselves stay on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

cache="${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-clients"
if [ ! -x "$cache/bin/python" ]; then
    python3 -m venv "$cache"
fi
"$cache/bin/pip" install --quiet --disable-pip-version-check -r scripts/clients/requirements.txt

cargo build --quiet --release -p bitnet-server --example serve
port="${PORT:-18080}"
target="${CARGO_TARGET_DIR:-target}"
"$target/release/examples/serve" "127.0.0.1:$port" > "$cache/server.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
for _ in $(seq 100); do
    if "$cache/bin/python" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/ready')" 2>/dev/null; then
        break
    fi
    sleep 0.1
done

export BITNET_URL="http://127.0.0.1:$port" LITELLM_LOCAL_MODEL_COST_MAP=True
if [ "${1:-}" = schemathesis ] || [ $# -eq 0 ]; then
    "$cache/bin/schemathesis" run "$BITNET_URL/openapi.json" --max-examples "${EXAMPLES:-30}" \
        --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
        --phases examples,coverage,fuzzing --suppress-health-check all --seed 1 --workers 2
fi
if [ "${1:-}" != schemathesis ]; then
    "$cache/bin/python" -m pytest -q -p no:cacheprovider scripts/clients/test_clients.py ${1:+-k "$1"}
fi
