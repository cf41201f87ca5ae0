#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Gives libguestfs a kernel without installing one on this machine: fetches Debian's or
# Ubuntu's package, unpacks it into the cache and prints the three variables that
# supermin reads, for `eval`.
set -euo pipefail
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tranship/guestfs-kernel
meta=linux-image-amd64
grep -q "^ID=ubuntu" /etc/os-release && meta=linux-image-generic

# The meta package depends on the versioned one.
package=$(apt-cache depends "$meta" | awk '/Depends: linux-image-[0-9]/ { print $2; exit }')
version=${package#linux-image-}
version=${version#unsigned-}
if [[ ! -d $cache/$package ]]; then
    staging=$(mktemp -d)
    trap 'rm -rf -- "$staging"' EXIT
    packages=("$package")
    # Ubuntu keeps the modules apart.
    apt-cache show "linux-modules-$version" >/dev/null 2>&1 && packages+=("linux-modules-$version")
    chmod 755 "$staging"
    (cd "$staging" && apt-get download -q "${packages[@]}") >&2
    for deb in "$staging"/*.deb; do
        dpkg-deb -x "$deb" "$staging/tree"
    done
    depmod --basedir "$staging/tree" "$version" >&2
    mkdir -p "$cache"
    mv "$staging/tree" "$cache/$package"
fi
printf 'export SUPERMIN_KERNEL=%q\n' "$cache/$package/boot/vmlinuz-$version"
printf 'export SUPERMIN_KERNEL_VERSION=%q\n' "$version"
printf 'export SUPERMIN_MODULES=%q\n' "$cache/$package/lib/modules/$version"
