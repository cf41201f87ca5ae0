#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
# user.sh: the appliance in our own monitor for somebody without any rights, in a nested machine: an
# ordinary user without capabilities and without a way to get any, as in a restricted container.
# All there is is a /dev/kvm that everybody may open.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
command -v setpriv >/dev/null || {
  echo "skipped: setpriv is not installed" >&2
  exit 77
}
cat >"$work/run" <<'RUN'
#!/bin/sh
fail() {
  echo "$*" >&2
  tail -n 30 /tmp/user/log >&2
  exit 1
}
chmod 755 / && chmod 666 /dev/kvm && mkdir /tmp/user && chown -R 65534:65534 /tmp/user /cache || exit
export HOME=/tmp/user TMPDIR=/tmp/user
cd /tmp/user || exit
anybody() {
  setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
}
anybody cat /proc/self/status >status || fail "setpriv failed"
grep -q '^Uid:.65534.65534' status && grep -q '^CapEff:.0*$' status && grep -q '^CapBnd:.0*$' status &&
  grep -q '^NoNewPrivs:.1$' status || fail "this is somebody else: $(cat status)"
# What it says depends on how busy the machine around this one is; nobody may have forbidden it.
anybody tranship appliance probe --json --backend auto >probe 2>log || fail "no probe"
grep -E '"(backend|reason|elapsed_ms)"' probe
anybody truncate -s 64M disk && anybody mke2fs -q -F disk || exit
for start in cold warm; do
  anybody tranship shell -x -a disk --backend kvm >out 2>log <<COMMANDS || fail "$start: it failed"
run
mount /dev/sda /
write /file "from nobody, $start "
cat /file
COMMANDS
  grep -q "from nobody, $start " out || fail "$start: nothing was read"
  if [ $start = warm ]; then
    grep -q 'the agent is awake' log || fail "it was booted again"
  fi
  echo "uid 65534 without capabilities, $start: ok"
done
RUN
chmod +x "$work/run"
CARRY="$work/run=/run-user" PROGRAMS="setpriv chown mkdir truncate" "$here/machine.sh" /bin/sh /run-user
