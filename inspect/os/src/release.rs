// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which distribution it is: `os-release(5)` and the files before it.

use crate::Result;
use crate::facts::{Family, Init, Kind, OperatingSystem};
use crate::reader::{Reader, assignment};
use tranship_protocol::GuestPath;

/// Largest program that is opened to learn its architecture.
const PROGRAM: u64 = 8 << 20;

/// Names of a distribution: its `ID=` in os-release, our name, and its family.
const DISTROS: &[(&str, &str, Family)] = &[
    ("debian", "debian", Family::Debian),
    ("ubuntu", "ubuntu", Family::Debian),
    ("linuxmint", "linuxmint", Family::Debian),
    ("kali", "kalilinux", Family::Debian),
    ("raspbian", "raspbian", Family::Debian),
    ("devuan", "devuan", Family::Debian),
    ("rhel", "rhel", Family::RedHat),
    ("centos", "centos", Family::RedHat),
    ("fedora", "fedora", Family::RedHat),
    ("rocky", "rocky", Family::RedHat),
    ("almalinux", "almalinux", Family::RedHat),
    ("ol", "oraclelinux", Family::RedHat),
    ("amzn", "amazonlinux", Family::RedHat),
    ("circle", "circle", Family::RedHat),
    ("anolis", "anolis", Family::RedHat),
    ("openEuler", "openeuler", Family::RedHat),
    ("sles", "sles", Family::Suse),
    ("sled", "sled", Family::Suse),
    ("opensuse", "opensuse", Family::Suse),
    ("opensuse-leap", "opensuse", Family::Suse),
    ("opensuse-tumbleweed", "opensuse-tumbleweed", Family::Suse),
    ("altlinux", "altlinux", Family::Alt),
    ("arch", "archlinux", Family::Arch),
    ("alpine", "alpinelinux", Family::Alpine),
];

/// Looks at the release files; there is always an answer, if only `unknown`.
pub(crate) fn operating_system(reader: &Reader<'_>) -> Result<OperatingSystem> {
    let release = match reader.text("/etc/os-release")? {
        Some(text) => text,
        None => reader.text("/usr/lib/os-release")?.unwrap_or_default(),
    };
    let (distro, family) = distribution(reader, &release)?;
    let version = version(reader, &distro, &release)?;
    let (format, management) = match family {
        Family::Debian => (Some("deb"), Some("apt")),
        Family::Arch => (Some("pacman"), Some("pacman")),
        Family::Alpine => (Some("apk"), Some("apk")),
        Family::Suse => (Some("rpm"), Some("zypper")),
        Family::Alt => (Some("rpm"), Some("apt")),
        Family::RedHat if reader.has_file("/usr/bin/dnf")? => (Some("rpm"), Some("dnf")),
        Family::RedHat => (Some("rpm"), Some("yum")),
        Family::Other => (None, None),
    };
    Ok(OperatingSystem {
        kind: Kind::Linux,
        product_name: assignment(&release, "PRETTY_NAME").map(str::to_owned),
        codename: assignment(&release, "VERSION_CODENAME").map(str::to_owned),
        arch: architecture(reader)?,
        hostname: hostname(reader)?,
        osinfo: osinfo(&distro, version),
        package_format: format.map(str::to_owned),
        package_management: management.map(str::to_owned),
        init: init(reader)?,
        distro,
        family,
        version,
    })
}

fn distribution(reader: &Reader<'_>, release: &str) -> Result<(String, Family)> {
    let known = |id: &str| DISTROS.iter().find(|(name, ..)| name.eq_ignore_ascii_case(id));
    if let Some(id) = assignment(release, "ID") {
        if let Some((_, name, family)) = known(id) {
            return Ok(((*name).to_owned(), *family));
        }
        let like = assignment(release, "ID_LIKE").unwrap_or_default();
        let family = like.split_whitespace().find_map(known).map_or(Family::Other, |found| found.2);
        return Ok((id.to_owned(), family));
    }
    if let Some(text) = reader.text("/etc/redhat-release")? {
        let name = match text.split_whitespace().next().unwrap_or_default() {
            "CentOS" => "centos",
            "Fedora" => "fedora",
            "Rocky" => "rocky",
            "AlmaLinux" => "almalinux",
            "Red" => "rhel",
            _ => "redhat-based",
        };
        return Ok((name.to_owned(), Family::RedHat));
    }
    let before_os_release = [
        ("/etc/debian_version", "debian", Family::Debian),
        ("/etc/SuSE-release", "suse-based", Family::Suse),
        ("/etc/altlinux-release", "altlinux", Family::Alt),
        ("/etc/alpine-release", "alpinelinux", Family::Alpine),
        ("/etc/arch-release", "archlinux", Family::Arch),
    ];
    for (file, name, family) in before_os_release {
        if reader.has_file(file)? {
            return Ok((name.to_owned(), family));
        }
    }
    Ok(("unknown".to_owned(), Family::Other))
}

fn version(reader: &Reader<'_>, distro: &str, release: &str) -> Result<Option<(u32, u32)>> {
    let from_release = assignment(release, "VERSION_ID").and_then(numbers);
    // Debian's os-release names no point release; debian_version does, except in testing.
    let file = match (distro, from_release) {
        ("debian", _) => "/etc/debian_version",
        (_, Some(_)) => return Ok(from_release),
        (_, None) => "/etc/redhat-release",
    };
    let text = reader.text(file)?.unwrap_or_default();
    let from_file = text.split_whitespace().find_map(numbers);
    Ok(match (from_release, from_file) {
        (Some(release), Some(file)) if release.0 != file.0 => Some(release),
        (release, file) => file.or(release),
    })
}

fn numbers(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    let major = parts.next()?.parse().ok()?;
    Some((major, parts.next().and_then(|minor| minor.parse().ok()).unwrap_or(0)))
}

fn osinfo(distro: &str, version: Option<(u32, u32)>) -> Option<String> {
    match (distro, version) {
        ("archlinux", _) => Some("archlinux".to_owned()),
        ("opensuse-tumbleweed", _) => Some("opensusetumbleweed".to_owned()),
        ("debian" | "fedora", Some((major, _))) => Some(format!("{distro}{major}")),
        // CentOS from 8 on names no point release, and 9 is Stream only.
        ("centos", Some((major, _))) if major >= 8 => Some(format!("centos-stream{major}")),
        ("ubuntu", Some((major, minor))) => Some(format!("ubuntu{major}.{minor:02}")),
        ("sles", Some((major, 0))) => Some(format!("sles{major}")),
        ("sles", Some((major, minor))) => Some(format!("sles{major}sp{minor}")),
        ("oraclelinux", Some((major, minor))) => Some(format!("ol{major}.{minor}")),
        (
            "rhel" | "centos" | "rocky" | "almalinux" | "opensuse" | "alpinelinux",
            Some((major, minor)),
        ) => Some(format!("{distro}{major}.{minor}")),
        _ => None,
    }
}

fn hostname(reader: &Reader<'_>) -> Result<Option<String>> {
    if let Some(text) = reader.text("/etc/hostname")? {
        let name =
            text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
        return Ok(name.map(str::to_owned));
    }
    let network = reader.text("/etc/sysconfig/network")?.unwrap_or_default();
    Ok(assignment(&network, "HOSTNAME").map(str::to_owned))
}

/// The architecture in the ELF header of a program that every system has.
fn architecture(reader: &Reader<'_>) -> Result<Option<String>> {
    for program in ["/bin/true", "/usr/bin/true", "/bin/sh", "/usr/bin/sh", "/sbin/init"] {
        let content = reader.bytes(&GuestPath::of(program), PROGRAM)?.unwrap_or_default();
        if let Some(arch) = elf_machine(&content) {
            return Ok(Some(arch.to_owned()));
        }
    }
    Ok(None)
}

/// `e_machine` at byte 18, in the byte order that byte 5 names (ELF specification, header).
fn elf_machine(content: &[u8]) -> Option<&'static str> {
    let header = content.get(..20).filter(|head| head.starts_with(b"\x7fELF"))?;
    let big = header.get(5) == Some(&2);
    let raw: [u8; 2] = header.get(18..20)?.try_into().ok()?;
    let machine = if big { u16::from_be_bytes(raw) } else { u16::from_le_bytes(raw) };
    match machine {
        3 => Some("i686"),
        20 => Some("ppc"),
        21 if big => Some("ppc64"),
        21 => Some("ppc64le"),
        22 => Some("s390x"),
        40 => Some("arm"),
        62 => Some("x86_64"),
        183 => Some("aarch64"),
        243 => Some("riscv64"),
        258 => Some("loongarch64"),
        _ => None,
    }
}

fn init(reader: &Reader<'_>) -> Result<Init> {
    let link = reader.link("/sbin/init")?.or(reader.link("/usr/sbin/init")?).unwrap_or_default();
    let systemd = ["/lib/systemd/systemd", "/usr/lib/systemd/systemd"];
    let mut has_systemd = false;
    for path in systemd {
        has_systemd |= reader.has_file(path)?;
    }
    if link.ends_with("systemd")
        || (link.is_empty() && has_systemd && !reader.has_file("/sbin/init")?)
    {
        return Ok(Init::Systemd { version: systemd_version(reader)? });
    }
    if reader.has_file("/sbin/openrc")? || reader.has_file("/usr/sbin/openrc")? {
        return Ok(Init::OpenRc);
    }
    let sysv = reader.has_file("/etc/inittab")?
        || reader.has_directory("/etc/rc.d/init.d")?
        || reader.has_directory("/etc/init.d")?;
    Ok(if sysv { Init::SysV } else { Init::Unknown })
}

/// systemd's version from the name of its private library.
fn systemd_version(reader: &Reader<'_>) -> Result<Option<u32>> {
    let directories = [
        "/usr/lib/systemd",
        "/lib/systemd",
        "/usr/lib64/systemd",
        "/usr/lib/x86_64-linux-gnu/systemd",
        "/usr/lib/aarch64-linux-gnu/systemd",
    ];
    for directory in directories {
        let found = reader.names(directory)?.iter().find_map(|name| {
            let rest = name.strip_prefix("libsystemd-shared-")?;
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        });
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::FolderTree;
    use std::fs;

    type Want = (&'static str, Family, Option<(u32, u32)>, Option<&'static str>);
    type Files<'a> = &'a [(&'a str, &'a str)];

    fn guest(files: Files<'_>) -> OperatingSystem {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        operating_system(&Reader::new(&FolderTree::new(dir.path()))).unwrap()
    }

    #[test]
    fn release_files_give_distribution_version_and_osinfo_name() {
        let cases: &[(Files<'_>, Want)] = &[
            (
                &[
                    ("etc/os-release", "ID=debian\nVERSION_ID=\"12\"\n"),
                    ("etc/debian_version", "12.5\n"),
                ],
                ("debian", Family::Debian, Some((12, 5)), Some("debian12")),
            ),
            (
                &[("etc/os-release", "ID=debian\n"), ("etc/debian_version", "trixie/sid\n")],
                ("debian", Family::Debian, None, None),
            ),
            (
                &[("usr/lib/os-release", "ID=ubuntu\nVERSION_ID='22.04'\n")],
                ("ubuntu", Family::Debian, Some((22, 4)), Some("ubuntu22.04")),
            ),
            (
                &[("etc/os-release", "ID=\"rhel\"\nVERSION_ID=\"9.2\"\n")],
                ("rhel", Family::RedHat, Some((9, 2)), Some("rhel9.2")),
            ),
            (
                &[("etc/redhat-release", "CentOS release 6.10 (Final)\n")],
                ("centos", Family::RedHat, Some((6, 10)), Some("centos6.10")),
            ),
            (
                &[("etc/os-release", "ID=tails\nID_LIKE=\"mystery debian\"\n")],
                ("tails", Family::Debian, None, None),
            ),
            (
                &[("etc/debian_version", "6.0.10\n")],
                ("debian", Family::Debian, Some((6, 0)), Some("debian6")),
            ),
            (&[], ("unknown", Family::Other, None, None)),
        ];
        for (files, (distro, family, version, id)) in cases {
            let os = guest(files);
            assert_eq!((os.distro.as_str(), os.family), (*distro, *family));
            assert_eq!((os.version, os.osinfo.as_deref()), (*version, *id), "{distro}");
        }
    }

    #[test]
    fn elf_headers_name_the_architecture() {
        let mut header = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0";
        assert_eq!(elf_machine(&header), Some("x86_64"));
        header[18..20].copy_from_slice(&[183, 0]);
        assert_eq!(elf_machine(&header), Some("aarch64"));
        assert_eq!(elf_machine(&header[..19]), None);
        assert_eq!(elf_machine(b"#!/bin/sh"), None);
    }
}
