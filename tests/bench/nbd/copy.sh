#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Measures `tranship copy` beside nbdcopy: the same words on the same files and servers, in
# turns, with a warm cache. Writes a Markdown table to target/bench/nbd/copy.md and prints it.
#
# BENCH_RUNS (5) runs of each side, the fastest counts; BENCH_MIB (2048) is the size of the
# disk, all of it data; BENCH_FOLDER is where it and the copies go (better a tmpfs, twice the
# size), BENCH_JOBS a pattern of the jobs to run (all).
set -euo pipefail
cd "$(dirname "$0")/../../.."

readonly RUNS=${BENCH_RUNS:-5} MIB=${BENCH_MIB:-2048} JOBS=${BENCH_JOBS:-.}
out=${CARGO_TARGET_DIR:-$PWD/target}/bench/nbd
tranship=$(realpath "${TRANSHIP_BIN:-${CARGO_TARGET_DIR:-$PWD/target}/release/tranship}")
measure=$PWD/tests/bench/measure
mkdir -p "$out"
folder=${BENCH_FOLDER:-$(mktemp -d "${TMPDIR:-/tmp}/tranship-bench-XXXXXX")}
mkdir -p "$folder"
record=$out/copy.tsv
: >"$record"
servers=()

finish() {
    ((${#servers[@]} == 0)) || kill "${servers[@]}" 2>/dev/null || true
    [[ -n ${BENCH_FOLDER:-} ]] || rm -rf -- "$folder"
}
trap finish EXIT

say() { printf '    %s\n' "$*" >&2; }

cd "$folder"
[[ -e disk && $(stat -c %s disk) == $((MIB << 20)) ]] ||
    head -c "$((MIB << 20))" /dev/urandom >disk
[[ -e disk.qcow2 ]] || qemu-img convert -q -f raw -O qcow2 disk disk.qcow2

# serve SOCKET COMMAND...: starts a server and waits for its socket.
serve() {
    local socket=$1
    shift
    rm -f -- "$socket"
    "$@" &
    servers+=($!)
    until nbdinfo --size "nbd+unix:///?socket=$folder/$socket" >/dev/null 2>&1; do sleep 0.05; done
}
serve nbdkit.sock nbdkit -f -U "$folder/nbdkit.sock" file disk
serve nbdkit-target.sock nbdkit -f -U "$folder/nbdkit-target.sock" memory "${MIB}M"
serve ours.sock "$tranship" serve -t -r -e 8 -k "$folder/ours.sock" -f raw disk
truncate -s "${MIB}M" ours-target
serve ours-target.sock "$tranship" serve -t -e 8 -k "$folder/ours-target.sock" -f raw ours-target
serve qemu.sock qemu-nbd -t -r -e 8 -k "$folder/qemu.sock" -f raw disk
serve qcow2.sock qemu-nbd -t -r -e 8 -k "$folder/qcow2.sock" -f qcow2 disk.qcow2
uri() { printf 'nbd+unix:///?socket=%s/%s.sock' "$folder" "$1"; }

# job NAME WORDS...: both programs in turns.
job() {
    local name=$1 round side program
    shift
    [[ $name =~ $JOBS ]] || return 0
    say "$name"
    cat -- disk disk.qcow2 >/dev/null
    for ((round = 0; round < RUNS; round++)); do
        for side in theirs ours; do
            program=(nbdcopy)
            [[ $side == theirs ]] || program=("$tranship" copy)
            rm -f -- target
            "$measure" "$record" "$name|$side" "${program[@]}" "$@" >"$out/log" 2>&1 || {
                printf 'bench: %s (%s) failed:\n' "$name" "$side" >&2
                tail -n 15 "$out/log" >&2
                return 1
            }
        done
    done
    rm -f -- target
}

job 'file to null:' disk null:
job 'file to file' disk target
for server in ours nbdkit qemu; do
    job "$server to null:" "$(uri $server)" null:
    job "$server to null:, -C 1" -C 1 "$(uri $server)" null:
    job "$server to file" "$(uri $server)" target
    job "$server to file, -C 1" -C 1 "$(uri $server)" target
done
job 'qemu, 4 KiB requests' --request-size=4096 -C 1 "$(uri qemu)" null:
job 'qemu qcow2 to file' "$(uri qcow2)" target
for server in ours nbdkit; do
    job "file to $server" disk "$(uri $server-target)"
    job "file to $server, -C 1" -C 1 disk "$(uri $server-target)"
done
job 'nbdkit to nbdkit' "$(uri nbdkit)" "$(uri nbdkit-target)"

{
    printf 'Disk: %s MiB of data; warm cache; %s × %s; nbdcopy %s; load %s; fastest of %s.\n\n' \
        "$MIB" "$(nproc)" "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" \
        "$(nbdcopy --version | awk 'NR == 1 { print $2 }')" \
        "$(cut -d' ' -f1 /proc/loadavg)" "$RUNS"
    printf '| copy | theirs GiB/s | ours GiB/s | ratio | CPU theirs | CPU ours | peak MiB theirs | ours |\n'
    printf '|---|---:|---:|---:|---:|---:|---:|---:|\n'
    awk -F '\t' -v gib="$(awk "BEGIN { print $MIB / 1024 }")" '
        {
            if (!($1 in wall) || $3 < wall[$1]) { wall[$1] = $3; cpu[$1] = $4 }
            if ($5 / 1024 > rss[$1]) rss[$1] = $5 / 1024
            name = $1; sub(/\|.*/, "", name)
            if (!(name in seen)) { seen[name]; order[++count] = name }
        }
        function rate(label) { return gib / (wall[label] > 0 ? wall[label] : 0.01) }
        END {
            for (i = 1; i <= count; i++) {
                t = order[i] "|theirs"; o = order[i] "|ours"
                printf "| %s | %.2f | %.2f | %.2f× | %.2f s | %.2f s | %.0f | %.0f |\n", order[i],
                    rate(t), rate(o), rate(o) / rate(t), cpu[t], cpu[o], rss[t], rss[o]
            }
        }' "$record"
} | tee "$out/copy.md"
