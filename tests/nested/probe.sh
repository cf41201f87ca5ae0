#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
# probe.sh: the KVM probe must find a nested KVM usable. Takes the time of one short boot.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
# With an explicit target, build scripts and macros stay dynamically linked.
target=x86_64-unknown-linux-gnu
RUSTFLAGS='-C target-feature=+crt-static' \
  cargo build --quiet --package tranship-kvm --example kvm-probe --target "$target"
built=${CARGO_TARGET_DIR:-target}/$target/debug/examples/kvm-probe
"$here/nested.sh" "$built" -v
