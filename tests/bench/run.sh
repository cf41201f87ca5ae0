#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Measures tranship beside the tools it replaces, on the same machine and the same guest,
# both without KVM: the start of the appliance against libguestfs, a whole conversion
# against virt-v2v. Writes a Markdown table to target/bench/table.md and prints it.
#
# BENCH_RUNS (2) runs of everything, the fastest counts; BENCH_ONLY=ours|theirs measures one
# side and keeps the other's figures of an earlier run.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly RUNS=${BENCH_RUNS:-2} ONLY=${BENCH_ONLY:-both}
out=${CARGO_TARGET_DIR:-$PWD/target}/bench
tranship=${TRANSHIP_BIN:-${CARGO_TARGET_DIR:-$PWD/target}/release/tranship}
guest=$(fixtures/debian12.sh)/guest.ova
mkdir -p "$out"

# One run of a command, recorded under a label; its output goes to a log beside the table.
measure() {
    local record=$1 label=$2
    shift 2
    printf '    %s: %s\n' "$label" "$*" >&2
    tests/bench/measure "$record" "$label" "$@" >"$out/$label.log" 2>&1 || {
        printf 'bench: %s failed; %s ends with:\n' "$label" "$out/$label.log" >&2
        tail -n 15 "$out/$label.log" >&2
        return 1
    }
}

# A conversion always starts with an empty target folder.
convert() {
    rm -rf -- "$out/disk"
    mkdir "$out/disk"
    measure "$@" -i ova "$guest" -o local -os "$out/disk" -of qcow2
    rm -rf -- "$out/disk"
}

theirs() {
    local run record=$out/theirs.tsv
    : >"$record"
    eval "$(tests/bench/guestfs-kernel.sh)"
    export LIBGUESTFS_BACKEND=direct LIBGUESTFS_BACKEND_SETTINGS=force_tcg
    # supermin builds its appliance at the first start and keeps it: not what is measured.
    guestfish -a /dev/null run
    for ((run = 0; run < RUNS; run++)); do
        measure "$record" start guestfish -a /dev/null run
        convert "$record" convert virt-v2v
    done
}

ours() {
    local run record=$out/ours.tsv
    : >"$record"
    # The same courtesy: kernel and image are built at the first start.
    "$tranship" appliance bench >/dev/null
    for ((run = 0; run < RUNS; run++)); do
        measure "$record" start "$tranship" appliance bench --runs 1
        convert "$record" convert "$tranship" convert
    done
}

# The fastest run of each label: wall seconds, CPU seconds, peak MiB. Ratios are theirs to ours.
table() {
    printf '| task | measure | virt-v2v / libguestfs | tranship | ratio |\n|---|---|---:|---:|---:|\n'
    awk -F '\t' '
        { key = FILENAME ~ /theirs/ ? "t" : "o"; at = key SUBSEP $1 }
        !(at in wall) || $3 < wall[at] { wall[at] = $3; cpu[at] = $4; rss[at] = $5 / 1024; seen[$1] }
        function row(task, what, value, unit,    t, o) {
            t = value["t", task]; o = value["o", task]
            printf "| %s | %s | %s | %s | %s |\n", task, what,
                t == "" ? "–" : sprintf("%.1f %s", t, unit),
                o == "" ? "–" : sprintf("%.1f %s", o, unit),
                (t == "" || o == "" || o == 0) ? "–" : sprintf("%.1f×", t / o)
        }
        END {
            split("start convert", tasks, " ")
            for (i = 1; i <= 2; i++) if (tasks[i] in seen) {
                row(tasks[i], "wall", wall, "s")
                row(tasks[i], "CPU", cpu, "s")
                row(tasks[i], "peak memory", rss, "MiB")
            }
        }' "$@"
}

[[ $ONLY == ours ]] || theirs
[[ $ONLY == theirs ]] || ours

records=()
for side in theirs ours; do
    [[ -s $out/$side.tsv ]] && records+=("$out/$side.tsv")
done
{
    printf 'Guest: Debian 12, 2 GiB disk, %s MiB OVA; no KVM; %s × %s; load %s; fastest of %s.\n\n' \
        "$(($(stat --format=%s "$guest") / 1024 / 1024))" "$(nproc)" \
        "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" \
        "$(cut -d' ' -f1 /proc/loadavg)" "$RUNS"
    table "${records[@]}"
} | tee "$out/table.md"
