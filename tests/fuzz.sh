#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Runs the property tests of the parsers again and again with new random input until
# FUZZ_SECONDS (300) are over. A failure leaves the shrunk input in proptest-regressions/,
# to be committed with the fix.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly LIMIT=${FUZZ_SECONDS:-300}

# The crates that have property tests, by their manifests.
mapfile -t manifests < <(grep --files-with-matches '^proptest' --recursive --include=Cargo.toml \
    formats appliance inspect convert)
arguments=()
for manifest in "${manifests[@]}"; do
    arguments+=(--package "$(sed -n '0,/^name = /s/^name = "\(.*\)"/\1/p' "$manifest")")
done

# Only the test programs that hold properties are worth repeating, optimised.
mapfile -t programs < <(cargo test --release --no-run --message-format=json "${arguments[@]}" |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' |
    while IFS= read -r program; do
        grep --quiet --binary-files=text PROPTEST_CASES "$program" && printf '%s\n' "$program"
    done)
((${#programs[@]})) || {
    echo "fuzz: no test program with properties" >&2
    exit 1
}

rounds=0
# Building does not count, and one round is always run.
SECONDS=0
while ((rounds == 0 || SECONDS < LIMIT)); do
    for program in "${programs[@]}"; do
        "$program" --quiet >/dev/null || {
            printf 'fuzz: %s failed in round %s; run it by hand to see\n' "$program" "$rounds" >&2
            exit 1
        }
    done
    rounds=$((rounds + 1))
done
printf 'fuzz: %s rounds over %s test programs, no failure\n' "$rounds" "${#programs[@]}"
