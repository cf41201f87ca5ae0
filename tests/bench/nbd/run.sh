#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Measures our NBD server beside qemu-nbd and nbdkit: the same clients (nbdcopy, and fio's
# engine for NBD) on the same files, in turns, with a warm cache. Writes a Markdown table to
# target/bench/nbd/table.md and prints it.
#
# BENCH_GIB (2) is the size of the disk, BENCH_FOLDER where disks and sockets go, BENCH_RUNS (2) the runs of each
# server, of which the fastest counts, BENCH_SECONDS (3) the length of a run of fio,
# BENCH_JOBS a pattern of the rows to measure (all).
set -euo pipefail
cd "$(dirname "$0")/../../.."

readonly GIB=${BENCH_GIB:-2} RUNS=${BENCH_RUNS:-2} SECONDS_EACH=${BENCH_SECONDS:-3}
readonly JOBS=${BENCH_JOBS:-.} PORT=${BENCH_PORT:-10909}
out=${CARGO_TARGET_DIR:-$PWD/target}/bench/nbd
tranship=$(realpath "${TRANSHIP_BIN:-${CARGO_TARGET_DIR:-$PWD/target}/release/tranship}")
folder=${BENCH_FOLDER:-$out/disks}
mkdir -p "$out" "$folder"
out=$(realpath "$out")
record=$out/record.tsv
: >"$record"
cd "$folder"
folder=$PWD

say() { printf '    %s\n' "$*" >&2; }

[[ -e $GIB.raw ]] || {
    say "making a disk of $GIB GiB"
    head -c "${GIB}G" /dev/urandom >part
    mv part "$GIB.raw"
}
[[ -e $GIB.qcow2 ]] || {
    qemu-img convert -q -f raw -O qcow2 "$GIB.raw" part
    mv part "$GIB.qcow2"
}

# The processor time of a process and its threads, in hundredths of a second.
ticks() { awk '{ print $14 + $15 }' "/proc/$1/stat"; }

server=
stop() {
    [[ -z $server ]] || {
        kill -TERM "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=
    }
}
trap stop EXIT

# start SIDE FORMAT TRANSPORT: leaves the process in $server and the address in $uri. A format
# with -r behind it is served for reading alone.
start() {
    local side=$1 format=${2%-r} transport=$3 socket=$folder/socket options=()
    local file=$folder/$GIB.$format
    rm -f -- "$socket"
    [[ $2 != *-r ]] || options=(-r)
    if [[ $transport == unix ]]; then
        uri="nbd+unix:///?socket=$socket"
    else
        uri="nbd://127.0.0.1:$PORT"
    fi
    case $side in
    ours | qemu-nbd)
        local program=(qemu-nbd)
        [[ $side == qemu-nbd ]] || program=("$tranship" serve)
        if [[ $transport == unix ]]; then
            "${program[@]}" -t -e 16 "${options[@]}" -f "$format" -k "$socket" "$file" &
        else
            "${program[@]}" -t -e 16 "${options[@]}" -f "$format" -b 127.0.0.1 -p "$PORT" "$file" &
        fi
        ;;
    nbdkit)
        if [[ $transport == unix ]]; then
            nbdkit -f -U "$socket" file "$file" &
        else
            nbdkit -f -i 127.0.0.1 -p "$PORT" file "$file" &
        fi
        ;;
    esac
    server=$!
    for _ in $(seq 100); do
        ! nbdinfo --size "$uri" >/dev/null 2>&1 || return 0
        sleep 0.05
    done
    say "$side does not answer"
    return 1
}

# note ROW SIDE AMOUNT SECONDS TICKS LATENCIES
note() { printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$@" >>"$record"; }

copying() {
    local row=$1 side=$2 before after begun ended
    shift 2
    before=$(ticks "$server")
    begun=$(date +%s.%N)
    "$@"
    ended=$(date +%s.%N)
    after=$(ticks "$server")
    note "$row" "$side" "$GIB" "$(echo "$ended - $begun" | bc)" $((after - before)) -
}

fio_run() {
    local row=$1 side=$2 mode=$3 depth=$4 jobs=$5 before after
    before=$(ticks "$server")
    fio --name=row --ioengine=nbd --uri="$uri" --rw="$mode" --bs=4k --iodepth="$depth" \
        --numjobs="$jobs" --group_reporting --time_based --runtime="$SECONDS_EACH" \
        --norandommap --output-format=json --output="$out/fio.json" >/dev/null
    after=$(ticks "$server")
    python3 - "$out/fio.json" "$row" "$side" $((after - before)) >>"$record" <<'PY'
import json, sys
path, row, side, ticks = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    text = file.read()
job = json.loads(text[text.index("{"):])["jobs"][0]
part = max((job["read"], job["write"]), key=lambda part: part["total_ios"])
clat = part["clat_ns"]
latencies = f'{clat["mean"] / 1000:.0f}/{clat["percentile"]["99.000000"] / 1000:.0f}'
print(row, side, part["total_ios"], part["runtime"] / 1000, ticks, latencies, sep="\t")
PY
}

rows() {
    local format=$1 transport=$2 side=$3 name="$1 $2"
    local wanted=()
    for kind in 'copy out' 'copy in' 'randread 1x1' 'randread 1x32' 'randread 4x32' \
        'randwrite 1x1' 'randwrite 1x32' 'randwrite 4x32'; do
        [[ $format != *-r || $kind == 'copy out' ]] || continue
        [[ ! "$name $kind" =~ $JOBS ]] || wanted+=("$kind")
    done
    ((${#wanted[@]})) || return 0
    start "$side" "$format" "$transport"
    for kind in "${wanted[@]}"; do
        say "$name $kind: $side"
        case $kind in
        'copy out') copying "$name $kind" "$side" nbdcopy "$uri" null: ;;
        'copy in') copying "$name $kind" "$side" nbdcopy "$folder/$GIB.raw" "$uri" ;;
        *)
            local mode=${kind% *} shape=${kind#* }
            fio_run "$name $kind" "$side" "$mode" "${shape#*x}" "${shape%x*}"
            ;;
        esac
    done
    stop
}

for ((round = 0; round < RUNS; round++)); do
    for transport in unix tcp; do
        for side in ours qemu-nbd nbdkit; do
            cat "$GIB.raw" >/dev/null
            rows raw "$transport" "$side"
        done
        for side in ours qemu-nbd; do
            cat "$GIB.qcow2" >/dev/null
            rows qcow2 "$transport" "$side"
            rows qcow2-r "$transport" "$side"
        done
    done
done

{
    printf 'Disk: %s GiB of random data; warm cache; %s × %s; %s; %s; load %s; fastest of %s.\n' \
        "$GIB" "$(nproc)" "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" \
        "$(qemu-nbd --version | sed -n 's/^qemu-nbd \([0-9.]*\).*/qemu-nbd \1/p')" \
        "$(nbdkit --version | cut -d' ' -f1-2)" "$(cut -d' ' -f1 /proc/loadavg)" "$RUNS"
    printf 'Copies in GiB/s and CPU seconds of the server per GiB; random 4 KiB in 1,000 operations\n'
    printf 'a second, mean/99%% latency in µs and CPU milliseconds of the server per 1,000 operations,\n'
    printf 'jobs x depth. Ahead: our speed by that of the faster peer, and the CPU time of the more\n'
    printf 'frugal one by ours.\n\n'
    printf '| row | ours | qemu-nbd | nbdkit | ahead | CPU ours | CPU qemu-nbd | CPU nbdkit | ahead |\n'
    printf '|---|---:|---:|---:|---:|---:|---:|---:|---:|\n'
    awk -F '\t' '
        {
            key = $1 "|" $2; speed = $3 / $4
            if (!(key in best) || speed > best[key]) {
                best[key] = speed; cpu[key] = $5 / 100 / $3; latency[key] = $6
            }
            if (!($1 in seen)) { seen[$1]; order[++count] = $1 }
        }
        function shown(key, copy) {
            if (!(key in best)) return "–"
            if (copy) return sprintf("%.2f", best[key])
            return sprintf("%.1f (%s)", best[key] / 1000, latency[key])
        }
        # Not a number if one of the two was not measured, or is less than a clock tick.
        function times(a, b) {
            return a && b ? sprintf("%.2f×", a / b) : "–"
        }
        function cost(key, copy) {
            if (!(key in best)) return "–"
            return copy ? sprintf("%.2f", cpu[key]) : sprintf("%.1f", cpu[key] * 1000000)
        }
        END {
            for (i = 1; i <= count; i++) {
                row = order[i]; copy = row ~ /copy/
                o = row "|ours"; q = row "|qemu-nbd"; n = row "|nbdkit"
                better = (q in best) ? best[q] : 0
                if ((n in best) && best[n] > better) better = best[n]
                frugal = (q in best) ? cpu[q] : 0
                if ((n in best) && (!frugal || cpu[n] < frugal)) frugal = cpu[n]
                printf "| %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", row, shown(o, copy),
                    shown(q, copy), shown(n, copy), times(best[o], better),
                    cost(o, copy), cost(q, copy), cost(n, copy), times(frugal, cpu[o])
            }
        }' "$record"
} | tee "$out/table.md"
