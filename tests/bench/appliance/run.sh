#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Measures the appliance: on this machine by emulation beside guestfish, and in a nested machine
# with KVM our monitor beside QEMU's microvm and QEMU as our other backend starts it, with the same
# kernel, initramfs and tools. Writes Markdown tables to target/bench/appliance/table.md and prints
# them.
#
# BENCH_RUNS (5) starts of each by emulation, BENCH_NESTED_RUNS (5) in the nested machine, in turns;
# least and median count. BENCH_PARTS names the parts to measure ("tcg nested instructions"); the
# others keep the figures of an earlier run. BENCH_PROFILE is cargo's profile of what is built to
# measure with (release).
set -euo pipefail
cd "$(dirname "$0")/../../.."

readonly RUNS=${BENCH_RUNS:-5} NESTED_RUNS=${BENCH_NESTED_RUNS:-5}
readonly PARTS=${BENCH_PARTS:-tcg nested instructions}
readonly PROFILE=${BENCH_PROFILE:-release}
target=${CARGO_TARGET_DIR:-$PWD/target}
out=$target/bench/appliance
export TRANSHIP_BIN=${TRANSHIP_BIN:-$target/release/tranship}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# figure FILE VALUE...: one more line of tab-separated values.
figure() {
    local file=$1 IFS=$'\t'
    shift
    printf '%s\n' "$*" >>"$file"
}

# now: milliseconds.
now() { echo $(($(date +%s%N) / 1000000)); }

# Starts with one disk by emulation, in turns with guestfish. Ours is timed twice: as a process
# from beginning to end like theirs, and by what it says itself.
emulated() {
    local record=$out/tcg.tsv run begun disk=$work/disk
    truncate -s 64M "$disk"
    : >"$record"
    eval "$(tests/bench/guestfs-kernel.sh)"
    # A device node does not mean that KVM works: libguestfs would wait for minutes.
    export LIBGUESTFS_BACKEND=direct LIBGUESTFS_BACKEND_SETTINGS=force_tcg
    # Both build an appliance at the first start and keep it, and ours is saved: not what is measured.
    guestfish --ro --format=raw -a "$disk" run
    "$TRANSHIP_BIN" shell --backend tcg --ro --format=raw -a "$disk" run
    for ((run = 0; run < RUNS; run++)); do
        printf '    by emulation: %s of %s\n' $((run + 1)) "$RUNS" >&2
        begun=$(now)
        guestfish --ro --format=raw -a "$disk" run
        figure "$record" process guestfish $(($(now) - begun))
        begun=$(now)
        "$TRANSHIP_BIN" shell --backend tcg --warm-start off --ro --format=raw -a "$disk" run
        figure "$record" process cold $(($(now) - begun))
        begun=$(now)
        "$TRANSHIP_BIN" shell --backend tcg --ro --format=raw -a "$disk" run
        figure "$record" process warm $(($(now) - begun))
        "$TRANSHIP_BIN" appliance bench --backend tcg --runs 1 --json >"$work/bench.json"
        python3 - "$work/bench.json" >>"$record" <<'PYTHON'
import json, sys
told = json.load(open(sys.argv[1], encoding="utf-8"))
for kind, rows in (("cold", "rows"), ("warm", "warm_rows")):
    for row in told[rows]:
        if row["name"] == "start, in all":
            print("ready", kind, round(row["min_ms"]), sep="\t")
PYTHON
    done
}

# In the nested machine: starts, memory, and exits for each request.
nested() {
    local measuring folder file files=()
    cargo build --quiet --profile "$PROFILE" --package tranship-tests --example appliance_bench
    measuring=$target/${PROFILE/dev/debug}/examples/appliance_bench
    files=("$measuring=/usr/bin/appliance_bench" "$(command -v qemu-system-x86_64)=/usr/bin/qemu-system-x86_64")
    # Firmware, from where this QEMU looks for it.
    for file in qboot.rom pvh.bin linuxboot_dma.bin kvmvapic.bin bios-256k.bin bios-microvm.bin; do
        for folder in /usr/share/qemu /usr/share/seabios /usr/share/qemu-kvm; do
            [[ ! -f $folder/$file ]] || files+=("$folder/$file=/usr/share/qemu/$file")
        done
    done
    CARRY=${files[*]} LIMIT=${LIMIT:-1800} tests/nested/machine.sh sh -c \
        "appliance_bench starts $NESTED_RUNS && appliance_bench memory && appliance_bench requests" |
        tee "$out/nested.log" >&2
    sed -n 's/^bench\t//p' "$out/nested.log" >"$out/nested.tsv"
}

# Instructions that our device spends on a read of 4 KiB from a file, where nothing else is
# counted: from the kick until the thread waits again, of a thousand requests that come one by one.
instructions() {
    local program few=500 many=1500 count collected=()
    program=$(cargo test --quiet --profile "$PROFILE" --package tranship-vmm --lib --no-run --message-format=json |
        sed -n 's/.*"executable":"\([^"]*\/tranship_vmm-[^"]*\)".*/\1/p' | tail -n 1)
    for count in "$few" "$many"; do
        TRANSHIP_BENCH_REQUESTS=$count valgrind --tool=callgrind --collect-atstart=no \
            --toggle-collect='*worker*follow*' --callgrind-out-file="$work/callgrind" \
            "$program" rounds --test-threads=1 >"$out/callgrind.log" 2>&1
        collected+=("$(sed -n 's/.*Collected : //p' "$out/callgrind.log")")
    done
    : >"$out/instructions.tsv"
    figure "$out/instructions.tsv" instructions 4k \
        $(((collected[1] - collected[0]) / (many - few)))
}

[[ " $PARTS " != *' tcg '* ]] || emulated
[[ " $PARTS " != *' nested '* ]] || nested
[[ " $PARTS " != *' instructions '* ]] || instructions
tests/bench/appliance/table.py "$out" | tee "$out/table.md"
