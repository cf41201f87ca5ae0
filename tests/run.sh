#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Runs every test of the workspace with the fixtures at hand; `make test` builds both.
# Arguments are handed to the test runner.
set -euo pipefail
cd "$(dirname "$0")/.."

TRANSHIP_TEST_FIXTURES=$(fixtures/debian12.sh)
TRANSHIP_TEST_NOOS=$(fixtures/noos.sh)
TRANSHIP_BIN=${TRANSHIP_BIN:-${CARGO_TARGET_DIR:-$PWD/target}/release/tranship}
export TRANSHIP_TEST_FIXTURES TRANSHIP_TEST_NOOS TRANSHIP_BIN

# What passing tests print is what they skipped; the harness's own lines around it are noise.
without_harness() {
    grep --line-buffered -vE \
        '^$|^ +std(out|err) ───|^ +running 1 test$|^ +test .* \.\.\. ok$|^ +test result: ok' || true
}

status=0
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --workspace --no-fail-fast --success-output immediate "$@" 2>&1 |
        without_harness || status=$?
    # The examples in the documentation are the one thing that nextest does not run.
    cargo test --workspace --doc --quiet || status=$?
else
    cargo test --workspace --no-fail-fast "$@" || status=$?
fi

# A real KVM is to be had on every machine inside QEMU: the probe has to find it usable, and our own
# monitor runs the appliance there.
tests/nested/all.sh || status=$?
exit "$status"
