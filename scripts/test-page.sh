#!/usr/bin/env bash
# Tests the page of `bitnet serve` in a headless Chromium, with its accessibility, and takes screenshots.
#
#   scripts/test-page.sh            all tests
#   scripts/test-page.sh markdown   those whose name holds a word
#
# Needs node, npm, a package index for the first run, and a browser: $CHROMIUM, chromium or google-chrome.
# PAGE_FILES=crates/bitnet-server/page tries files without building them into the program. Screenshots go to target/page. BITNET names a built program; otherwise one is built.
set -euo pipefail
cd "$(dirname "$0")/.."

chromium="${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}"
for need in node npm "$chromium"; do
    if [ -z "$need" ] || ! command -v "$need" > /dev/null; then
        echo "SKIPPED: the page's tests need node, npm and chromium; '${need:-chromium}' is missing"
        exit 0
    fi
done
cache="${XDG_CACHE_HOME:-$HOME/.cache}/bitnet-page"
mkdir -p "$cache"
if ! cmp -s scripts/page/package.json "$cache/package.json" || [ ! -d "$cache/node_modules/playwright-core" ]; then
    cp scripts/page/package.json "$cache/package.json"
    if ! (cd "$cache" && npm install --silent --no-audit --no-fund); then
        rm "$cache/package.json"
        echo "SKIPPED: no package index to install playwright-core and axe-core from"
        exit 0
    fi
fi
if [ -z "${BITNET:-}" ]; then
    cargo build --quiet --release -p bitnet-cli
    BITNET="${CARGO_TARGET_DIR:-target}/release/bitnet"
fi
mkdir -p target/page
BITNET="$BITNET" CHROMIUM="$chromium" PAGE_MODULES="$cache/" SCREENSHOTS=target/page node scripts/page/run.mjs "$@"
