#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
# tree.sh IMAGE MEBIBYTES PROGRAM...: an ext4 image with programs and the libraries they need.
#
# A program is a name on the search path or a path; either keeps its place. Further entries:
#   FROM=TO   the file FROM under the name TO
set -euo pipefail
image=$1
size=$2
shift 2
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree"/{proc,sys,dev,tmp,run,etc,root,var/tmp,usr/bin,usr/sbin,usr/lib,usr/lib64}
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$tree/$folder"; done
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n' >"$tree/etc/passwd"
printf 'root:x:0:\nnogroup:x:65534:\n' >"$tree/etc/group"
printf '127.0.0.1 localhost\n' >"$tree/etc/hosts"

# put FROM TO: a file into the tree, following links.
put() {
  [ -e "$tree$2" ] || install -D "$1" "$tree$2"
}

for entry in "$@"; do
  case $entry in
  *=*) from=${entry%%=*} to=${entry#*=} ;;
  *)
    from=$(command -v "$entry") || {
      echo "skipped: $entry is not installed" >&2
      exit 77
    }
    to=$from
    ;;
  esac
  put "$from" "$to"
  { LC_ALL=C ldd "$from" 2>/dev/null || true; } |
    sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p' |
    while read -r library; do put "$library" "$library"; done
done
truncate -s "${size}M" "$image"
mke2fs -q -F -t ext4 -O '^has_journal' -m 0 -d "$tree" "$image"
