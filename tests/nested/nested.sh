#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
# nested.sh PROGRAM [ARGUMENT...]: runs a static program where /dev/kvm works, on any machine.
#
# The processor that QEMU emulates offers AMD's virtualization. A Debian cloud kernel (L1) is booted
# on it with one initramfs that holds busybox, the KVM modules and PROGRAM, which then finds a usable
# /dev/kvm. Nothing is installed; neither root, nor KVM, nor a disk image is needed. The exit status
# is PROGRAM's; 70 if L1 never got that far, 77 if something is missing here.
#
#   FILES="a b"   further files, put under their base names into /
#   MEMORY=1024   MiB of L1
#   LIMIT=300     seconds until the run is ended
#   PACKAGE=...   kernel package (default linux-image-cloud-amd64)
#   DISK=file     an ext4 image; it becomes the root that PROGRAM, a path inside of it then, runs in
#   PROCESSORS=1       processors of L1
#
# Needs qemu-system-x86 busybox-static cpio lz4 xz-utils zstd, and apt to fetch the kernel once into
# ${XDG_CACHE_HOME:-~/.cache}/tranship/nested.
set -euo pipefail

skip() {
  echo "skipped: $*" >&2
  exit 77
}

[ $# -gt 0 ] || {
  echo "usage: nested.sh PROGRAM [ARGUMENT...]" >&2
  exit 64
}
program=$1
shift
for tool in qemu-system-x86_64 busybox cpio lz4 xz zstd od apt-get dpkg-deb; do
  command -v "$tool" >/dev/null || skip "$tool is not installed"
done
# A program that needs a loader would only say "not found" in there.
statics=("$(command -v busybox)")
[ -n "${DISK:-}" ] || statics+=("$program")
for static in "${statics[@]}"; do
  if LC_ALL=C ldd "$static" 2>/dev/null | grep -q '=>'; then skip "$static is not static"; fi
done
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tranship/nested
mkdir -p "$cache"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# fetch PACKAGE: prints the folder of the newest kernel that PACKAGE stands for, unpacked.
fetch() {
  local name new
  name=$(apt-cache depends "$1" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
  [ -n "$name" ] || name=$1
  if [ ! -d "$cache/$name" ]; then
    # Without a server to ask, any kernel that was fetched before is as good.
    if (cd "$work" && apt-get download "$name" >apt.log 2>&1); then
      # Several of these scripts may run at once: it is there as a whole or not at all.
      new=$(mktemp -d "$cache/.new.XXXXXX")
      chmod 755 "$new"
      dpkg-deb -x "$work/$name"_*.deb "$new"
      mv -T "$new" "$cache/$name" 2>/dev/null || { rm -rf "$new" && [ -d "$cache/$name" ]; }
    else
      name=$(find "$cache" -maxdepth 1 -name 'linux-image-*' -type d -printf '%f\n' | sort -V | tail -n 1)
      [ -n "$name" ] || skip "$1 cannot be fetched: $(tail -n 1 "$work/apt.log")"
    fi
  fi
  echo "$cache/$name"
}

# number FILE OFFSET SIZE: the little-endian number there.
number() { od -An "-tu$3" --endian=little -j "$2" -N "$3" "$1" | tr -d ' '; }

# vmlinux FOLDER: prints the path of the folder's kernel as ELF. L1 enters it directly (PVH), which
# saves some seconds of unpacking under emulation. Offsets: Linux' Documentation/arch/x86/boot.rst.
vmlinux() {
  local image start length magic
  if [ ! -f "$1/vmlinux" ]; then
    image=$(find "$1/boot" -name 'vmlinuz-*' | head -n 1)
    start=$(((1 + $(number "$image" 0x1f1 1)) * 512 + $(number "$image" 0x248 4)))
    length=$(number "$image" 0x24c 4)
    # The last four bytes of the payload are its size, not part of the compressed stream.
    tail -c "+$((start + 1))" "$image" | head -c "$((length - 4))" >"$work/payload" || true
    magic=$(od -An -tx1 -N 4 "$work/payload" | tr -d ' ')
    case $magic in
    fd377a58) xz -dc --single-stream <"$work/payload" ;;
    28b52ffd) zstd -dcq <"$work/payload" ;;
    1f8b*) gzip -dc <"$work/payload" ;;
    02214c18) lz4 -dcq <"$work/payload" ;;
    *) skip "the kernel in $image is compressed in an unknown way ($magic)" ;;
    esac >"$1/vmlinux.$$"
    mv "$1/vmlinux.$$" "$1/vmlinux"
  fi
  echo "$1/vmlinux"
}

# tsc_khz: the frequency of this machine's time-stamp counter. Without it L1 calibrates against an
# emulated timer and can hang on a busy machine.
tsc_khz() {
  local mhz
  mhz=$(dmesg 2>/dev/null | sed -n 's/.*tsc: .* \([0-9.]*\) MHz.*/\1/p' | tail -n 1)
  [ -n "$mhz" ] || mhz=$(sed -n 's/^cpu MHz[^0-9]*//p' /proc/cpuinfo | head -n 1)
  awk -v mhz="$mhz" 'BEGIN { printf "%.0f\n", mhz * 1000 }'
}

kernel=$(fetch "${PACKAGE:-linux-image-cloud-amd64}")
elf=$(vmlinux "$kernel")
khz=$(tsc_khz)

root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,tmp,modules,disk}
cp "$(command -v busybox)" "$root/bin/busybox"
modules=(irqbypass ccp kvm kvm-amd)
machine=microvm,acpi=off
device=()
if [ -n "${DISK:-}" ]; then
  # Devices on this machine's bus are found through ACPI.
  machine=microvm,acpi=on
  modules+=(virtio_ring virtio virtio_mmio virtio_blk)
  drive="if=none,id=root,format=raw,snapshot=on,file=${DISK//,/,,}"
  device=(-drive "$drive" -device "virtio-blk-device,drive=root")
else
  cp "$program" "$root/bin/program"
  program=/bin/program
fi
for file in ${FILES:-}; do cp "$file" "$root/"; done
for module in "${modules[@]}"; do
  file=$(find "$kernel/lib" -name "$module.ko*" | head -n 1)
  case $file in
  '') ;; # built in, or not needed by this kernel
  *.xz) xz -dc "$file" >"$root/modules/$module.ko" ;;
  *.zst) zstd -dcq "$file" >"$root/modules/$module.ko" ;;
  *) cp "$file" "$root/modules/$module.ko" ;;
  esac
done
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
busybox=/bin/busybox
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sys /sys
$busybox mount -t devtmpfs dev /dev
$busybox mount -t tmpfs tmp /tmp
for module in irqbypass ccp kvm kvm-amd virtio_ring virtio virtio_mmio virtio_blk; do
  [ ! -f /modules/$module.ko ] || $busybox insmod /modules/$module.ko 2>/dev/null
done
root=/
if [ -b /dev/vda ]; then
  root=/disk
  $busybox mount -t ext4 /dev/vda /disk
  for folder in proc sys dev; do $busybox mount -o bind /$folder /disk/$folder; done
  $busybox mount -t tmpfs tmp /disk/tmp
  $busybox ip link set lo up
fi
read up rest </proc/uptime
echo "nested: ready after $up s"
. /command
echo "nested: exit $?"
$busybox reboot -f
INIT
# shellcheck disable=SC2016 # the variables are for the shell in there
printf '$busybox chroot $root ' >"$root/command"
printf '%q ' "$program" "$@" >>"$root/command"
chmod +x "$root/init"
(cd "$root" && find . -print0 | cpio --null --create --format=newc --quiet) >"$work/initramfs"

# boot: runs L1 once; QEMU's status is in $ended.
boot() {
  ended=0
  timeout "${LIMIT:-300}" qemu-system-x86_64 -accel tcg,thread=multi -M "$machine" -cpu max \
    "${device[@]}" -smp "${PROCESSORS:-1}" -m "${MEMORY:-1024}" -nodefaults -no-user-config -display none -serial stdio -no-reboot \
    -kernel "$elf" -initrd "$work/initramfs" \
    -append "console=ttyS0 earlyprintk=ttyS0,115200 quiet panic=-1 reboot=t tsc_early_khz=$khz tsc=reliable no_timer_check mitigations=off nokaslr rdinit=/init" \
    </dev/null 2>"$work/qemu.err" | sed -u 's|\r||g' | tee "$work/console" |
    grep --line-buffered -v '^\[    0\.000000\]' || ended=${PIPESTATUS[0]}
}

began=$(date +%s%N)
boot
# One in some hundred emulated machines resets itself in its first moments, before anything that is
# tested here: that is QEMU's or L1's. One that has begun is never run again.
for again in 2 3; do
  if [ "$ended" != 0 ] || grep -q '^nested: ready' "$work/console"; then break; fi
  tail -n 20 "$work/console"
  echo "nested: the machine reset itself before it was up; start number $again"
  boot
done
grep -v 'TCG doesn.t support' "$work/qemu.err" >&2 || true
code=$(sed -n 's/^nested: exit \([0-9]*\)$/\1/p' "$work/console" | tail -n 1)
echo "nested: ${code:+program ended, }whole run $((($(date +%s%N) - began) / 1000000)) ms"
exit "${code:-70}"
