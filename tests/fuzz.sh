#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Looks for input that the parsers of disks cannot stand, for FUZZ_SECONDS (300) without
# building: a fifth of the time the property tests run again and again with new input, then
# each fuzz target gets its share. FUZZ_TARGETS, a pattern like 'v*', takes some of them
# only, and leaves the property tests out.
#
# What a property test finds is shrunk in proptest-regressions/; what a target finds lies
# in tests/fuzz/regressions/ afterwards, where the tests replay it. Both are to be committed
# with the fix. The corpus grows in target/fuzz/.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly LIMIT=${FUZZ_SECONDS:-300}
readonly PATTERN=${FUZZ_TARGETS:-*}
readonly FOLDER=${CARGO_TARGET_DIR:-$PWD/target}/fuzz

properties() {
    local limit=$1 manifest program rounds=0
    local -a manifests arguments programs
    # The crates that have property tests, by their manifests.
    mapfile -t manifests < <(grep --files-with-matches '^proptest' --recursive --include=Cargo.toml \
        formats appliance inspect convert)
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
        return 1
    }

    # Building does not count, and one round is always run.
    SECONDS=0
    while ((rounds == 0 || SECONDS < limit)); do
        for program in "${programs[@]}"; do
            "$program" --quiet >/dev/null || {
                printf 'fuzz: %s failed in round %s; run it by hand to see\n' "$program" "$rounds" >&2
                return 1
            }
        done
        rounds=$((rounds + 1))
    done
    printf 'fuzz: %s rounds over %s test programs, no failure\n' "$rounds" "${#programs[@]}"
}

# Prints the targets that the pattern takes, one a line.
targets() {
    local file name
    for file in tests/fuzz/fuzz_targets/*.rs; do
        name=$(basename "$file" .rs)
        # shellcheck disable=SC2053 # it is a pattern
        [[ $name == $PATTERN ]] && printf '%s\n' "$name"
    done
    return 0
}

# Runs one target for so many seconds; leaves its finding where the tests replay it.
target() {
    local name=$1 seconds=$2 status=0
    local program=$FOLDER/$TRIPLE/release/$name log=$FOLDER/$name.log found
    mkdir -p "$FOLDER/corpus/$name" "$FOLDER/seeds/$name" "$FOLDER/artifacts/$name"
    "$program" "$FOLDER/corpus/$name" "$FOLDER/seeds/$name" \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=256 \
        -max_len=131072 -print_final_stats=1 -artifact_prefix="$FOLDER/artifacts/$name/" \
        >"$log" 2>&1 </dev/null || status=$?
    if ((status == 0)); then
        printf 'fuzz: %-10s %8s inputs, %6s/s, %6s edges, corpus of %s\n' "$name" \
            "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" \
            "$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")" \
            "$(sed -n 's/^#[0-9].* cov: \([0-9]*\).*/\1/p' "$log" | tail -n 1)" \
            "$(find "$FOLDER/corpus/$name" -type f | wc -l)"
        return
    fi
    found=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
    printf 'fuzz: %s failed; its log is %s\n' "$name" "$log" >&2
    grep --max-count 5 -E "panicked at|^==.*ERROR|SUMMARY" -A 1 "$log" >&2 || true
    if [[ -n $found ]]; then
        mkdir -p "tests/fuzz/regressions/$name"
        cp -- "$found" "tests/fuzz/regressions/$name/"
        printf 'fuzz: the input is tests/fuzz/regressions/%s/%s\n' "$name" "$(basename "$found")" >&2
    fi
    return 1
}

main() {
    local -a names
    local name seconds status=0
    mapfile -t names < <(targets)
    ((${#names[@]})) || {
        printf 'fuzz: no target is called %s\n' "$PATTERN" >&2
        return 2
    }
    seconds=$LIMIT
    if [[ $PATTERN == '*' ]]; then
        properties $((LIMIT / 5)) || status=1
        seconds=$((LIMIT - LIMIT / 5))
    fi
    # The stable compiler is enough: what needs nightly are sanitizers, and the parsers are
    # safe Rust. Memory is limited by the allocator of the targets.
    cargo fuzz build --fuzz-dir tests/fuzz --sanitizer none --target "$TRIPLE" \
        --target-dir "$FOLDER"
    rm -rf -- "$FOLDER/seeds"
    cargo run --quiet --package tranship-tests --example fuzz_seeds "$FOLDER/seeds"
    seconds=$((seconds / ${#names[@]}))
    for name in "${names[@]}"; do
        target "$name" $((seconds > 0 ? seconds : 1)) || status=1
    done
    return "$status"
}

TRIPLE=$(rustc -vV | sed -n 's/^host: //p')
readonly TRIPLE
main
