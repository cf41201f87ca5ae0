#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
# kernels.sh [SUITE/PACKAGE...]: the appliance with Debian's kernels in our own monitor, in a nested
# machine: it boots, is restored, and mounts what its modules are for.
#
# By default those of Debian 12 and 13, generic and cloud. They are fetched once, with indexes of our
# own, into ${XDG_CACHE_HOME:-~/.cache}/tranship/nested/kernels; this machine's are left alone. 77 if
# none can be had. TRANSHIP_BIN is the program, the release build by default.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
[ $# -gt 0 ] || set -- bookworm/linux-image-amd64 bookworm/linux-image-cloud-amd64 \
  trixie/linux-image-amd64 trixie/linux-image-cloud-amd64
program=${TRANSHIP_BIN:-${CARGO_TARGET_DIR:-$PWD/target}/release/tranship}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tranship/nested/kernels
mkdir -p "$cache"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# fetch SUITE/PACKAGE: prints the folder with the unpacked kernel.
fetch() {
  local suite=${1%%/*} apt=$work/apt-${1%%/*} from name
  local options=(-o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=-
    -o "Dir::State=$apt" -o "Dir::State::status=/dev/null" -o "Dir::Cache=$apt/cache"
    -o Acquire::Languages=none)
  if [ ! -d "$apt" ]; then
    # Wherever this machine gets Debian's packages from.
    # shellcheck disable=SC2016 # the word is for apt
    from=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
      grep '/debian/$' | sort -u | head -n 1)
    [ -n "$from" ] && [ -f "$keyring" ] || return 1
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    echo "deb [signed-by=$keyring] $from $suite main" >"$apt/sources.list"
    apt-get "${options[@]}" update >"$apt/log" 2>&1 || true
  fi
  name=$(apt-cache "${options[@]}" depends "${1#*/}" 2>/dev/null |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
  if [ -n "$name" ] && [ ! -d "$cache/$1/$name" ]; then
    mkdir -p "$work/download" "$cache/$1"
    (cd "$work/download" && apt-get "${options[@]}" download "$name" >>"$apt/log" 2>&1) || return 1
    dpkg-deb -x "$work/download/$name"_*.deb "$work/kernel"
    mv -T "$work/kernel" "$cache/$1/$name"
    rm -r "$work/download"
  fi
  # Without a server to ask, one that was fetched before is as good.
  [ -n "$name" ] || name=$(cd "$cache/$1" 2>/dev/null && find . -mindepth 1 -maxdepth 1 | sort -V | tail -n 1)
  [ -n "$name" ] && echo "$cache/$1/$name"
}

strip -o "$work/tranship" "$program"
carried=() number=0
for kernel in "$@"; do
  folder=$(fetch "$kernel") || {
    echo "skipped: $kernel cannot be fetched" >&2
    continue
  }
  image=$(find "$folder/boot" -name 'vmlinuz-*' | head -n 1)
  modules=$(find "$folder" -path '*/lib/modules/*' -prune -print | head -n 1)
  number=$((number + 1))
  TRANSHIP_CACHE=$work/built "$work/tranship" appliance build --kernel "$image" --modules "$modules" >"$work/build.log" 2>&1 || {
    cat "$work/build.log" >&2
    exit 1
  }
  TRANSHIP_CACHE=$work/built "$work/tranship" appliance export "$work/appliance.tar" >/dev/null 2>&1
  (umask 077 && TRANSHIP_CACHE=$work/caches/$number "$work/tranship" appliance import "$work/appliance.tar") >/dev/null
  rm "$work/appliance.tar"
  echo "$kernel" >"$work/caches/$number/name"
  while read -r file; do carried+=("$work/$file=/$file"); done < <(cd "$work" && find "caches/$number" -type f)
done
[ $number -gt 0 ] || exit 77

cat >"$work/run" <<'RUN'
#!/bin/sh
fail() {
  echo "$*" >&2
  tail -n 30 /tmp/log >&2
  dmesg | tail -n 3 >&2
  exit 1
}
cd /tmp || exit
truncate -s 400M ext4 xfs btrfs
mke2fs -q -F -t ext4 ext4 && mkfs.xfs -q xfs && mkfs.btrfs -q btrfs >/dev/null 2>&1 || exit
chmod -R go-rwx /caches
for cache in /caches/*; do
  export TRANSHIP_CACHE=$cache
  tranship appliance build >built 2>/tmp/log || fail "$cache: not built"
  read -r release rest <built
  read -r name <"$cache/name"
  for start in cold warm; do
    read -r before rest </proc/uptime
    tranship shell -x --format=raw -a ext4 -a xfs -a btrfs >out 2>/tmp/log <<COMMANDS || fail "$release, $start: it failed"
run
mount /dev/sda /
write /file "ext4 $release $start "
cat /file
umount /
mount /dev/sdb /
write /file "xfs $release $start "
cat /file
umount /
mount /dev/sdc /
write /file "btrfs $release $start "
cat /file
umount /
COMMANDS
    read -r after rest </proc/uptime
    for kind in ext4 xfs btrfs; do
      grep -q "$kind $release $start " out || fail "$release, $start: nothing was read from $kind"
    done
    if [ $start = warm ]; then
      grep -q 'the agent is awake' /tmp/log || fail "$release: it was booted again"
    fi
    echo "$name: $release, $start: ok, $before to $after s"
  done
  rm -r "$cache"
done
RUN
chmod +x "$work/run"
CARRY="$work/run=/run-kernels ${carried[*]}" PROGRAMS="truncate rm" TRANSHIP_BIN=$work/tranship LIMIT=${LIMIT:-1500} \
  "$here/machine.sh" /bin/sh /run-kernels
