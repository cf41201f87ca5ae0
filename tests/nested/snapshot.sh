#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
# snapshot.sh [PROCESSORS...]: a guest in our own monitor is saved while it runs and restored twice,
# in a nested machine. The guest is a stock Debian kernel with busybox. HUGE=1: its memory is pages of
# hugetlbfs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
[ $# -gt 0 ] || set -- 1 2
target=x86_64-unknown-linux-gnu
RUSTFLAGS='-C target-feature=+crt-static' \
  cargo build ${RELEASE:+--release} --quiet --package tranship-vmm --example snapshot --target "$target"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
profile=${RELEASE:+release}
strip -o "$work/snapshot" "${CARGO_TARGET_DIR:-target}/$target/${profile:-debug}/examples/snapshot"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tranship/nested
kernel=$(find "$cache" -maxdepth 2 -name vmlinux | sort -V | tail -n 1)
# Fetched by the first run of anything else in there.
[ -n "$kernel" ] || "$here/probe.sh"
kernel=$(find "$cache" -maxdepth 2 -name vmlinux | sort -V | tail -n 1)

root=$work/root
mkdir -p "$root"/{bin,modules,proc,sys,dev,tmp}
cp "$(command -v busybox)" "$root/bin/"
number=10
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk virtio_console \
  rng-core virtio-rng; do
  file=$(find "$(dirname "$kernel")/lib" -name "$module.ko*" | head -n 1)
  [ -n "$file" ] || continue # built in
  case $file in
  *.xz) xz -dc "$file" ;;
  *.zst) zstd -dcq "$file" ;;
  *) cat "$file" ;;
  esac >"$root/modules/$((number++))-$module.ko"
done
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in /modules/*; do $b insmod $module; done
port=
while [ ! "$port" ]; do
  for name in /sys/class/virtio-ports/*/name; do
    read text <$name && [ "$text" = org.tranship.control.0 ] && port=${name%/name}
  done
  $b usleep 10000
done
exec 3<>/dev/${port##*/}
count=$($b nproc)
# Something goes on all the time on every processor.
c=0
while [ $c -lt $count ]; do
  $b taskset $((1 << c)) $b sh -c "i=0; while :; do i=\$((i+1)); echo \$i >/tmp/$c; $b usleep 20000; done" &
  c=$((c + 1))
done
number=0
echo hello >&3
while read word <&3; do
  case $word in
  quick) echo "here" >&3 ;;
  off) $b poweroff -f ;;
  report)
    for c in /tmp/*; do echo "  processor ${c##*/}: $($b cat $c) turns" >&3; done
    echo "  clock: $($b cat /sys/devices/system/clocksource/*/current_clocksource) $($b date +%s)" >&3
    # The driver asks for entropy ahead of time: what it already held at the time of the snapshot
    # comes first, the same in every machine.
    echo "entropy: $($b dd if=/dev/hwrng bs=64 count=32 2>/dev/null | $b tail -c 16 | $b hexdump -e '16/1 "%02x"')" >&3
    $b dmesg | $b grep -E 'BUG:|WARNING|lockup|unstable|stall|hung task|backwards' | $b sed 's/^/complaint: /' >&3
    echo . >&3
    ;;
  *)
    number=$((number + 1))
    read before rest </proc/uptime
    c=0
    while [ $c -lt $count ]; do
      $b taskset $((1 << c)) $b sleep 0.1
      c=$((c + 1))
    done
    read after rest </proc/uptime
    sum=0
    for value in $($b dd if=/dev/vda bs=512 skip=$number count=2 iflag=direct 2>/dev/null |
      $b hexdump -v -e '1/4 "%u "'); do sum=$((sum + value)); done
    echo "guest $number" >/dev/ttyS0
    echo "$number $word $before $after $sum on $count" >&3
    ;;
  esac
done
INIT
chmod +x "$root/init"
(cd "$root" && find . -print0 | cpio --null --create --format=newc --quiet) >"$work/guest"
for processors in "$@"; do
  echo "== $processors processor(s)"
  FILES="$kernel $work/guest" MEMORY=${MEMORY:-2048} \
    "$here/nested.sh" "$work/snapshot" /vmlinux /guest 256 "$processors" ${HUGE:+huge}
done
