#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
# machine.sh [COMMAND...]: the appliance in our own monitor, where KVM works: in a nested machine.
#
# Without arguments the tests of the appliance are run there and a start is measured, with
# arguments this command. TRANSHIP_BIN is the program, the release build by default; CARRY="FROM=TO..."
# names further files, PROGRAMS further programs. ALL=1: no test is left out for the time it takes.
# TESTS="NAME..." are the tests, all of the appliance's by default; the measured start belongs to
# those of appliance, the conversion to those of appliance_machine.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
target=${CARGO_TARGET_DIR:-$PWD/target}
program=${TRANSHIP_BIN:-$target/release/tranship}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# An appliance that needs no package manager is carried over as a whole.
"$program" appliance export "$work/appliance.tar" >/dev/null 2>&1
TRANSHIP_CACHE=$work/cache "$program" appliance import "$work/appliance.tar" >/dev/null
mapfile -t cached < <(cd "$work" && find cache -type f -printf '%p\n')
entries=()
for file in "${cached[@]}"; do entries+=("$work/$file=/$file"); done

# Symbols are no use in there, and have to be read by an emulated machine.
strip -o "$work/program" "$program"
entries+=("$work/program=/usr/bin/tranship")
read -ra names <<<"${TESTS:-appliance appliance_machine}"
if [ $# -eq 0 ]; then
  for name in "${names[@]}"; do
    tests=$(cargo test --quiet --package tranship-tests --no-run --test "$name" --message-format=json |
      sed -n "s/.*\"executable\":\"\([^\"]*\/$name-[^\"]*\)\".*/\1/p" | tail -n 1)
    [ -x "$tests" ] || {
      echo "the tests of $name were not built" >&2
      exit 1
    }
    strip -o "$work/$name" "$tests"
    entries+=("$work/$name=/usr/bin/test-$name")
  done
fi
cat >"$work/run" <<'RUN'
#!/bin/sh
export PATH=/usr/bin:/usr/sbin HOME=/root TMPDIR=/tmp TRANSHIP_CACHE=/cache
export TRANSHIP_BIN=/usr/bin/tranship RUST_BACKTRACE=1
umask 077
chmod -R go-rwx /cache
# Nobody names a backend: the probe has to find KVM usable here, if not at once then on a quieter
# moment of the machine around this one.
for _ in 1 2 3 4 5; do
  tranship appliance probe >/tmp/probe
  if grep -x 'backend: kvm' /tmp/probe; then found=yes && break; fi
done
[ "$found" ] || {
  cat /tmp/probe
  exit 1
}
export TRANSHIP_BACKEND=kvm
tranship appliance build >/dev/null 2>&1
if [ $# -gt 0 ]; then
  exec "$@"
fi
# Emulated twice over, tests beside one another would only wait for one another.
# An exported appliance is packed, unpacked and started twice; eight processors on one are saved and
# restored. Each takes longer than all others of its file together.
[ -f /all ] || skip='--skip exported --skip eight_processors_come_back'
# shellcheck disable=SC2086 # no word or several
[ ! -f /usr/bin/test-appliance ] || test-appliance --test-threads=1 $skip || exit
[ ! -f /usr/bin/test-appliance ] || tranship appliance bench --runs 1 || exit
[ -f /usr/bin/test-appliance_machine ] || exit 0
# shellcheck disable=SC2086 # no word or several
test-appliance_machine --test-threads=1 $skip || exit
if [ -f /guest.ova ]; then
  tranship convert --quiet /guest.ova -o local -os /var/tmp -of qcow2 || exit
  tranship image check /var/tmp/guest-sda || exit
  ls -l /var/tmp
fi
RUN
chmod +x "$work/run"
entries+=("$work/run=/run-inside")
if [ $# -eq 0 ] && [ -n "${TRANSHIP_TEST_FIXTURES:-}" ]; then
  entries+=("$TRANSHIP_TEST_FIXTURES/guest.ova=/guest.ova")
fi
[ -z "${ALL:-}" ] || entries+=("$work/run=/all")
for file in ${CARRY:-}; do entries+=("$file"); done
export PATH=$PATH:/usr/sbin:/sbin
programs=(sh chmod ls cat dmesg grep tail mke2fs mkfs.xfs mkfs.btrfs mkfs.vfat e2fsck xfs_repair btrfs fsck.vfat
  debugfs xz readelf mkfifo)
read -ra further <<<"${PROGRAMS:-}"
programs+=(${further[@]+"${further[@]}"})
for name in "${programs[@]}"; do
  if command -v "$name" >/dev/null; then entries+=("$name"); else echo "without $name" >&2; fi
done
"$here/tree.sh" "$work/root" 3072 "${entries[@]}"
DISK=$work/root MEMORY=${MEMORY:-2560} LIMIT=${LIMIT:-900} "$here/nested.sh" /run-inside "$@"
