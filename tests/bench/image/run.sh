#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Measures `tranship image` beside qemu-img: the same job on the same files, in turns, with
# a warm cache. Writes a Markdown table to target/bench/image/table.md and prints it.
#
# BENCH_RUNS (3) runs of each side, the fastest counts, and BENCH_SLOW_RUNS (1) of what takes
# qemu-img more than half a minute; BENCH_GIB (8) is the size of the
# disk, BENCH_FOLDER where it and the copies go (some three times its size), BENCH_JOBS a
# pattern of the jobs to run (all), BENCH_KEEP=1 adds to the runs of before. On machines that
# give unused memory back to their host, the kernel's part of identical runs varies by three:
# BENCH_TOUCH=N touches and frees N GiB (0) before each run, so that a host which took them
# back returns them before the clock runs.
set -euo pipefail
cd "$(dirname "$0")/../../.."

readonly TOUCH=${BENCH_TOUCH:-0}
readonly RUNS=${BENCH_RUNS:-3} SLOW=${BENCH_SLOW_RUNS:-1} GIB=${BENCH_GIB:-8} JOBS=${BENCH_JOBS:-.}
out=${CARGO_TARGET_DIR:-$PWD/target}/bench/image
tranship=$(realpath "${TRANSHIP_BIN:-${CARGO_TARGET_DIR:-$PWD/target}/release/tranship}")
folder=${BENCH_FOLDER:-$out/disks}
measure=$PWD/tests/bench/measure
mkdir -p "$out" "$folder"
record=$out/record.tsv
[[ -n ${BENCH_KEEP:-} ]] || : >"$record"

say() { printf '    %s\n' "$*" >&2; }

# A disk and its copies are kept for the next run; a changed size makes new ones.
[[ -e $folder/$GIB.raw ]] || {
    rm -f -- "$folder"/*
    say "making a disk of $GIB GiB"
    python3 tests/bench/image/disk.py "$folder/part" "$GIB"
    mv -- "$folder/part" "$folder/$GIB.raw"
}
cd "$folder"
made() {
    local name=$1
    shift
    [[ -e $name ]] || {
        say "making $name"
        "$@" part >&2
        mv -- part "$name"
    }
}
made qcow2 qemu-img convert -q -f raw -O qcow2 "$GIB.raw"
made zlib.qcow2 qemu-img convert -q -f raw -O qcow2 -c -W -m 16 "$GIB.raw"
made zstd.qcow2 qemu-img convert -q -f raw -O qcow2 -c -W -m 16 -o compression_type=zstd "$GIB.raw"
made vhdx qemu-img convert -q -f raw -O vhdx "$GIB.raw"
made vmdk qemu-img convert -q -f raw -O vmdk "$GIB.raw"
made stream.vmdk "$tranship" image convert -q -f raw -O vmdk -o subformat=streamOptimized "$GIB.raw"
[[ -e empty.vhdx ]] || qemu-img create -q -f vhdx empty.vhdx 1T
[[ -e empty.vmdk ]] || qemu-img create -q -f vmdk empty.vmdk 1T

# One run of a command; the target of the last one is removed first, and what the last one
# wrote is on the disk, so that nobody pays for somebody else's writeback.
run() {
    local label=$1
    shift
    rm -f -- target
    sync
    ((TOUCH == 0)) || python3 -c "b'1' * ($TOUCH << 30)"
    "$measure" "$record" "$label" "$@" >"$out/log" 2>&1 || {
        printf 'bench: %s failed:\n' "$label" >&2
        tail -n 15 "$out/log" >&2
        return 1
    }
}

# job NAME INPUT THEIRS... -- OURS...: both sides in turns.
job() {
    local name=$1 input=$2 theirs=() round
    shift 2
    [[ $name =~ $JOBS ]] || return 0
    while [[ $1 != -- ]]; do
        theirs+=("$1")
        shift
    done
    shift
    say "$name"
    cat -- "$input" >/dev/null
    for ((round = 0; round < ${ROUNDS:-RUNS}; round++)); do
        run "$name|theirs" "${theirs[@]}"
        [[ ! -e target ]] || printf '%s\t%s\n' "$name|theirs" "$(du -k target | cut -f1)" >>"$out/sizes.tsv"
        run "$name|ours" "$@"
        [[ ! -e target ]] || printf '%s\t%s\n' "$name|ours" "$(du -k target | cut -f1)" >>"$out/sizes.tsv"
    done
    rm -f -- target
}

# The same words for both programs.
both() {
    local name=$1 input=$2
    shift 2
    job "$name" "$input" qemu-img "$@" -- "$tranship" image "$@"
}

[[ -n ${BENCH_KEEP:-} ]] || : >"$out/sizes.tsv"
both 'raw to qcow2' "$GIB.raw" convert -f raw -O qcow2 "$GIB.raw" target
both 'qcow2 to raw' qcow2 convert -f qcow2 -O raw qcow2 target
both 'vhdx to qcow2' vhdx convert -f vhdx -O qcow2 vhdx target
both 'vmdk to qcow2' vmdk convert -f vmdk -O qcow2 vmdk target
both 'raw to vhdx' "$GIB.raw" convert -f raw -O vhdx "$GIB.raw" target
ROUNDS=$SLOW both 'raw to stream vmdk' "$GIB.raw" convert -f raw -O vmdk -o subformat=streamOptimized "$GIB.raw" target
both 'stream vmdk to qcow2' stream.vmdk convert -f vmdk -O qcow2 stream.vmdk target
ROUNDS=$SLOW both 'raw to qcow2 -c zlib' "$GIB.raw" convert -c -f raw -O qcow2 "$GIB.raw" target
both 'raw to qcow2 -c zstd' "$GIB.raw" convert -c -o compression_type=zstd -f raw -O qcow2 "$GIB.raw" target
both 'qcow2 zlib to raw' zlib.qcow2 convert -f qcow2 -O raw zlib.qcow2 target
both 'qcow2 zstd to raw' zstd.qcow2 convert -f qcow2 -O raw zstd.qcow2 target
both 'compare raw qcow2' "$GIB.raw" compare -f raw -F qcow2 "$GIB.raw" qcow2
ROUNDS=$SLOW both 'empty 1 TiB vhdx to qcow2' empty.vhdx convert -f vhdx -O qcow2 empty.vhdx target
both 'empty 1 TiB vmdk to qcow2' empty.vmdk convert -f vmdk -O qcow2 empty.vmdk target
both 'empty 1 TiB vhdx map' empty.vhdx map --output json -f vhdx empty.vhdx
both 'empty 1 TiB vmdk map' empty.vmdk map --output json -f vmdk empty.vmdk
# How far a plain copy of the file is away: theirs is cp here.
job 'raw to qcow2 beside cp' "$GIB.raw" cp --sparse=always "$GIB.raw" target -- \
    "$tranship" image convert -f raw -O qcow2 "$GIB.raw" target
job 'qcow2 to raw beside cp' qcow2 cp --sparse=always "$GIB.raw" target -- \
    "$tranship" image convert -f qcow2 -O raw qcow2 target

{
    printf 'Disk: %s GiB, half empty, mixed data; warm cache; %s × %s; %s; load %s; fastest of %s.\n\n' \
        "$GIB" "$(nproc)" "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" \
        "$(qemu-img --version | sed -n 's/^qemu-img version \([0-9.]*\).*/qemu-img \1/p')" \
        "$(cut -d' ' -f1 /proc/loadavg)" "$RUNS"
    printf '| job | theirs | ours | ratio | CPU theirs | CPU ours | peak MiB | size ours/theirs |\n'
    printf '|---|---:|---:|---:|---:|---:|---:|---:|\n'
    awk -F '\t' '
        FILENAME ~ /sizes/ { size[$1] = $2; next }
        {
            if (!($1 in wall) || $3 < wall[$1]) { wall[$1] = $3; cpu[$1] = $4 }
            if ($5 / 1024 > rss[$1]) rss[$1] = $5 / 1024
            name = $1; sub(/\|.*/, "", name)
            if (!(name in seen)) { seen[name]; order[++count] = name }
        }
        END {
            for (i = 1; i <= count; i++) {
                t = order[i] "|theirs"; o = order[i] "|ours"
                printf "| %s | %.2f s | %.2f s | %.1f× | %.2f s | %.2f s | %.0f | %s |\n", order[i],
                    wall[t], wall[o], wall[t] / (wall[o] + 0 ? wall[o] : 0.01), cpu[t], cpu[o], rss[o],
                    ((t in size) && (size[t] > 0)) ? sprintf("%.2f", size[o] / size[t]) : "–"
            }
        }' "$out/sizes.tsv" "$record"
} | tee "$out/table.md"
