#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
# disks.sh [COUNT...]: guests with as many disks as RHEL 5 under Xen knew, in our own monitor in a
# nested machine: all are there in order, and what is written arrives in the right file. SMP=2: they
# have two processors.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -gt 0 ] || set -- 256
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/run" <<'RUN'
#!/bin/sh
# name NUMBER: the name of the disk with this number from 0, as the kernel counts.
name() {
  number=$1 name=
  while [ "$number" -ge 0 ]; do
    rest=$((number % 26))
    for letter in a b c d e f g h i j k l m n o p q r s t u v w x y z; do
      [ $rest -gt 0 ] || break
      rest=$((rest - 1))
    done
    name=$letter$name
    number=$((number / 26 - 1))
  done
}
fail() {
  echo "$*" >&2
  tail -n 20 /tmp/log >&2
  exit 1
}
smp=$1
shift
for count in "$@"; do
  folder=/tmp/disks-$count
  mkdir "$folder" && cd "$folder" || exit
  arguments=
  index=0
  : >expected
  while [ $index -lt "$count" ]; do
    truncate -s $((1048576 + index * 4096)) "$index"
    arguments="$arguments -a $index"
    name $index
    echo "/dev/sd$name" >>expected
    index=$((index + 1))
  done
  echo run >commands
  echo list-devices >>commands
  chosen="0 25 26 62 63 $((count / 2)) $((count - 1))"
  for index in $chosen; do
    [ "$index" -lt "$count" ] || continue
    mke2fs -q -F -t ext2 "$index" || fail "$count disks: no filesystem on $index"
    name "$index"
    cat >>commands <<COMMANDS
blockdev-getsize64 /dev/sd$name
mount /dev/sd$name /
write /file "this is $index "
cat /file
umount /
COMMANDS
  done
  read before rest </proc/uptime
  # shellcheck disable=SC2086 # one word each
  tranship shell --smp "$smp" --format=raw $arguments <commands >out 2>/tmp/log || fail "$count disks: the shell failed"
  read after rest </proc/uptime
  grep '^/dev/sd' out >listed
  cmp expected listed || fail "$count disks: the list is another one"
  for index in $chosen; do
    [ "$index" -lt "$count" ] || continue
    grep -q "^$((1048576 + index * 4096))\$" out || fail "$count disks: no disk has the size of $index"
    grep -q "this is $index " out || fail "$count disks: disk $index was not read"
    debugfs -R 'cat /file' "$index" 2>/dev/null | grep -q "^this is $index \$" ||
      fail "$count disks: nothing has reached disk $index"
  done
  tail -n 1 listed
  echo "$count disks: ok, from $before to $after s"
  cd /tmp && rm -r "$folder"
done
RUN
chmod +x "$work/run"
CARRY="$work/run=/run-disks ${CARRY:-}" PROGRAMS="truncate cmp mkdir rm" "$here/machine.sh" /bin/sh /run-disks "${SMP:-1}" "$@"
