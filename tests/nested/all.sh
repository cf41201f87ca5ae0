#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
# all.sh: everything that is tested in nested machines with every run of the tests. They have one
# processor each, so two of them run at a time. What a part prints comes when it is through.
# What a nested machine needs may be missing: then a part says so, and that is no failure.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# part SCRIPT [ARGUMENT...]: one of them.
part() {
  local status=0 log
  log=$(mktemp "$work/XXXXXX")
  "$here/$1.sh" "${@:2}" >"$log" 2>&1 || status=$?
  {
    printf '\nIn a nested machine: %s\n' "$*${TESTS:+, tests of $TESTS}"
    cat "$log"
    case $status in
    0) ;;
    77) printf 'skipped: something that the nested machine needs is missing\n' ;;
    *) printf 'failed: %s, with status %s\n' "$*" "$status" && touch "$work/failed" ;;
    esac
  } >"$log.told"
  # In one piece each.
  flock "$work" cat "$log.told"
}

# The probe comes first, alone: it fetches the kernel that all of them boot.
part probe
# Of the others both rows take two and a half minutes.
{
  TESTS=appliance part machine
  part snapshot 2
} &
{
  TESTS=appliance_machine part machine
  part user
}
wait
[ ! -e "$work/failed" ]
