#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Measures encrypted servers beside each other, over a Unix socket: ours, qemu-nbd and nbdkit
# with the same certificates and the same disk, in turns, with nbdcopy and with
# `tranship copy` as clients. Writes a Markdown table to target/bench/nbd/tls.md and prints it.
#
# BENCH_GIB (1) is the size of the disk, BENCH_FOLDER where disk and socket go, BENCH_RUNS (3)
# the runs of each row, of which the fastest counts, BENCH_ROWS a pattern of rows (all).
set -euo pipefail
cd "$(dirname "$0")/../../.."

readonly GIB=${BENCH_GIB:-1} RUNS=${BENCH_RUNS:-3} ROWS=${BENCH_ROWS:-.}
out=${CARGO_TARGET_DIR:-$PWD/target}/bench/nbd
tranship=$(realpath "${TRANSHIP_BIN:-${CARGO_TARGET_DIR:-$PWD/target}/release/tranship}")
folder=${BENCH_FOLDER:-$out/disks}
mkdir -p "$out" "$folder"
out=$(realpath "$out")
record=$out/tls.tsv
: >"$record"
cd "$folder"
folder=$PWD

say() { printf '    %s\n' "$*" >&2; }

[[ -e $GIB.raw ]] || {
    say "making a disk of $GIB GiB"
    head -c "${GIB}G" /dev/urandom >part
    mv part "$GIB.raw"
}
truncate -s "${GIB}G" target.raw

mkdir -p pki
(
    cd pki
    key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
    openssl req -x509 "${key[@]}" -days 2 -keyout ca-key.pem -out ca-cert.pem -subj /CN=authority \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign
    for side in server client; do
        printf '%s\n' basicConstraints=CA:FALSE keyUsage=critical,digitalSignature,keyEncipherment \
            "extendedKeyUsage=${side}Auth" subjectAltName=DNS:localhost >extensions
        openssl req -new "${key[@]}" -keyout $side-key.pem -out $side.csr -subj /CN=$side
        openssl x509 -req -in $side.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
            -extfile extensions -out $side-cert.pem
    done
) 2>/dev/null

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

uri="nbds+unix:///?socket=$folder/socket&tls-certificates=$folder/pki&tls-hostname=localhost"

# start SIDE FILE: leaves the process in $server.
start() {
    local side=$1 file=$2 socket=$folder/socket
    local object="tls-creds-x509,id=t,endpoint=server,verify-peer=off,dir=$folder/pki"
    local words=(-t -e 16 -f raw --tls-creds t --object "$object" -k "$socket" "$file")
    rm -f -- "$socket"
    case $side in
    ours) "$tranship" serve "${words[@]}" & ;;
    qemu-nbd) qemu-nbd "${words[@]}" & ;;
    nbdkit) nbdkit -f -U "$socket" --tls=require --tls-certificates="$folder/pki" file "$file" & ;;
    esac
    server=$!
    for _ in $(seq 100); do
        ! nbdinfo --size "$uri" >/dev/null 2>&1 || return 0
        sleep 0.05
    done
    say "$side does not answer"
    return 1
}

# row NAME SIDE FILE COMMAND...
row() {
    local name=$1 side=$2 file=$3 before after begun ended
    shift 3
    [[ $name =~ $ROWS ]] || return 0
    say "$name: $side"
    start "$side" "$file"
    before=$(ticks "$server")
    begun=$(date +%s.%N)
    "$@" >/dev/null
    ended=$(date +%s.%N)
    after=$(ticks "$server")
    printf '%s\t%s\t%s\t%s\n' "$name" "$side" "$(echo "$ended - $begun" | bc)" \
        $((after - before)) >>"$record"
    stop
}

for ((round = 0; round < RUNS; round++)); do
    for side in ours qemu-nbd nbdkit; do
        cat "$GIB.raw" >/dev/null
        disk=$folder/$GIB.raw
        row 'nbdcopy out' $side "$disk" nbdcopy "$uri" null:
        row 'nbdcopy out -C 1' $side "$disk" nbdcopy -C 1 "$uri" null:
        row 'nbdcopy out synchronous' $side "$disk" nbdcopy --synchronous "$uri" null:
        row 'tranship copy out' $side "$disk" "$tranship" copy "$uri" null:
        row 'nbdcopy in' $side "$folder/target.raw" nbdcopy "$disk" "$uri"
        row 'tranship copy in' $side "$folder/target.raw" "$tranship" copy "$disk" "$uri"
    done
done

{
    printf 'TLS 1.3; disk: %s GiB of random data; warm cache; %s × %s; load %s; fastest of %s.\n' \
        "$GIB" "$(nproc)" "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" \
        "$(cut -d' ' -f1 /proc/loadavg)" "$RUNS"
    printf 'GiB/s, and CPU seconds of the server per GiB.\n\n'
    printf '| row | ours | qemu-nbd | nbdkit | against qemu-nbd | CPU ours | CPU qemu-nbd | CPU nbdkit |\n'
    printf '|---|---:|---:|---:|---:|---:|---:|---:|\n'
    awk -F '\t' -v gib="$GIB" '
        {
            key = $1 "|" $2; speed = gib / $3; cost = $4 / 100 / gib
            if (!(key in best) || speed > best[key]) best[key] = speed
            if (!(key in least) || cost < least[key]) least[key] = cost
            if (!($1 in seen)) { seen[$1]; order[++count] = $1 }
        }
        END {
            for (i = 1; i <= count; i++) {
                row = order[i]; o = row "|ours"; q = row "|qemu-nbd"; n = row "|nbdkit"
                printf "| %s | %.2f | %.2f | %.2f | %.2f× | %.2f | %.2f | %.2f |\n", row, best[o],
                    best[q], best[n], best[q] ? best[o] / best[q] : 0, least[o], least[q], least[n]
            }
        }' "$record"
} | tee "$out/tls.md"
