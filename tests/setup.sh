#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# Makes a fresh Debian or Ubuntu machine able to build and test. What is there already is
# left alone, so a second run is quick and needs no network. Touches the system only
# through apt, with sudo unless run as root; `fuzz` installs cargo-fuzz for the user.
#
# Usage: setup.sh [build|test|check|bench|fuzz]...   (default: test)
set -euo pipefail
cd "$(dirname "$0")/.."

# package:program, or package:/file for packages without a program of their own.
readonly BUILD=(gcc:cc libc6-dev:/usr/include/stdlib.h make:make pkg-config:pkg-config git:git)
readonly TEST=(
    qemu-utils:qemu-img qemu-system-x86:qemu-system-x86_64
    mmdebstrap:mmdebstrap uidmap:newuidmap
    debian-archive-keyring:/usr/share/keyrings/debian-archive-keyring.gpg
    e2fsprogs:mke2fs xfsprogs:mkfs.xfs btrfs-progs:mkfs.btrfs dosfstools:mkfs.vfat ntfs-3g:mkfs.ntfs
    lvm2:lvm mdadm:mdadm cryptsetup-bin:cryptsetup
    fdisk:sfdisk gdisk:sgdisk util-linux:unshare
    busybox-static:busybox cpio:cpio xz-utils:xz zstd:zstd lz4:lz4 bzip2:bzip2
    libnbd-bin:nbdinfo nbdkit:nbdkit fio:fio openssl:openssl
    python3-libvhdi:/usr/share/doc/python3-libvhdi/copyright
    strace:strace systemd:systemd-socket-activate
)
readonly FUZZ=(g++:g++)
readonly CHECK=(shellcheck:shellcheck)
readonly BENCH=(
    python3:python3 libguestfs-tools:guestfish virt-v2v:virt-v2v kmod:depmod procps:ps bc:bc
    valgrind:valgrind binutils:strip
)

say() {
    printf 'setup: %s\n' "$*" >&2
}

as_root() {
    if [[ $(id -u) == 0 ]]; then
        DEBIAN_FRONTEND=noninteractive "$@"
    elif command -v sudo >/dev/null; then
        sudo -n DEBIAN_FRONTEND=noninteractive "$@"
    else
        say "this needs root, and there is no sudo: $*"
        return 1
    fi
}

# Prints the packages of the list whose program or file is not there.
missing() {
    local entry probe
    for entry in "$@"; do
        probe=${entry#*:}
        case $probe in
        /*) [[ -e $probe ]] || printf '%s\n' "${entry%%:*}" ;;
        # The administrator's programs are not on everybody's PATH.
        *) PATH=$PATH:/usr/sbin:/sbin command -v "$probe" >/dev/null || printf '%s\n' "${entry%%:*}" ;;
        esac
    done
}

# Whether apt could install the package.
offered() {
    apt-cache policy "$1" 2>/dev/null | grep 'Candidate: [0-9]' >/dev/null
}

apt_install() {
    as_root apt-get install --yes --quiet --no-install-recommends "$@"
}

# A machine with some of its QEMU packages from backports, but without that archive in its
# sources, cannot install the others: their versions have to be the same.
enable_backports() {
    local codename
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    grep -q '^ID=debian' /etc/os-release || return 1
    say "adding the $codename-backports archive"
    as_root tee /etc/apt/sources.list.d/tranship-backports.sources >/dev/null <<SOURCES
Types: deb
URIs: http://deb.debian.org/debian
Suites: $codename-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
    as_root apt-get update --quiet
    target_release=$codename-backports
}

install_packages() {
    local -a wanted
    mapfile -t wanted < <(missing "$@")
    # The appliance's kernel comes out of a package too, so apt has to know its archive.
    if ((${#wanted[@]} == 0)) && { offered linux-image-amd64 || offered linux-image-generic; }; then
        return
    fi
    as_root apt-get update --quiet
    ((${#wanted[@]})) || return 0
    say "installing ${wanted[*]}"
    apt_install "${wanted[@]}" && return
    say "apt refused; trying with backports"
    local target_release=
    enable_backports
    apt_install --target-release "$target_release" "${wanted[@]}"
}

# Succeeds if the first version is not below the second.
at_least() {
    [[ $(printf '%s\n%s\n' "$2" "$1" | sort --version-sort | head -n 1) == "$2" ]]
}

# Cargo's version in this folder, or nothing.
cargo_version() {
    cargo --version 2>/dev/null | awk '{ print $2 }'
}

rust() {
    local required found
    export PATH=$HOME/.cargo/bin:$PATH
    required=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    found=$(cargo_version || true)
    if [[ -n $found ]] && at_least "$found" "$required"; then
        return
    fi
    say "Rust $required or newer is needed, found ${found:-none}"
    if ! command -v rustup >/dev/null && offered rustup; then
        as_root apt-get update --quiet
        apt_install rustup
    fi
    if command -v rustup >/dev/null; then
        rustup toolchain install "$required" --profile minimal --component clippy --component rustfmt
        # For this folder only; the user's default stays what it is.
        rustup override set "$required"
        return
    fi
    say "neither Rust $required nor rustup is here, and this release has no rustup package."
    say "install it from https://rustup.rs, for example:"
    say "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal -c clippy -c rustfmt"
    say "and run this again"
    return 1
}

cargo_fuzz() {
    cargo fuzz --version >/dev/null 2>&1 && return
    say "installing cargo-fuzz into cargo's home"
    cargo install cargo-fuzz --locked
}

main() {
    local -a packages=()
    local group
    for group in "${@:-test}"; do
        case $group in
        build) packages+=("${BUILD[@]}") ;;
        test) packages+=("${BUILD[@]}" "${TEST[@]}") ;;
        check) packages+=("${BUILD[@]}" "${CHECK[@]}") ;;
        bench) packages+=("${BUILD[@]}" "${TEST[@]}" "${BENCH[@]}") ;;
        fuzz) packages+=("${BUILD[@]}" "${FUZZ[@]}") ;;
        *)
            say "unknown group $group"
            return 2
            ;;
        esac
    done
    if command -v apt-get >/dev/null; then
        install_packages "${packages[@]}"
    else
        mapfile -t packages < <(missing "${packages[@]}")
        if ((${#packages[@]})); then
            say "this script knows apt only; install what these Debian packages hold: ${packages[*]}"
            return 1
        fi
    fi
    if [[ " $* " == *' bench '* && ! -d /lib/modules ]]; then
        # supermin looks there even if told another place.
        as_root mkdir /lib/modules
    fi
    rust
    if [[ " $* " == *' fuzz '* ]]; then
        cargo_fuzz
    fi
}

main "$@"
