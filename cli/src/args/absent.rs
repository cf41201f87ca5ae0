// SPDX-License-Identifier: Apache-2.0 OR MIT
//! virt-v2v's options and modes that are known, but have nothing behind them.
//!
//! Each is refused by name with what works instead: an option that is accepted and does
//! nothing would cost its user more than an error does.

use crate::failure::Failure;

const LOCAL: &str = "write to a folder with -o local -os DIR and take the disks from there";
const FILES: &str = "read the guest from files: -i ova, -i vmx or -i disk";
const NOT_WITH_FILES: &str = "it belongs to a source or target that is not there; leave it out";
const AFTERWARDS: &str = "change the guest afterwards with `tranship shell -a DISK -i`";

/// Options by their exact words, and what to do instead.
const OPTIONS: &[(&str, &str)] = &[
    ("-ic", FILES),
    ("-it", FILES),
    ("-io", NOT_WITH_FILES),
    ("-ip", NOT_WITH_FILES),
    ("-oc", LOCAL),
    ("-oo", NOT_WITH_FILES),
    ("-op", NOT_WITH_FILES),
    ("-O", "print the facts with --dry-run --json"),
    ("--block-driver", "it only concerns Windows guests, which are not converted yet"),
    ("--keys-from-stdin", "give keys with --key ID:file:FILE"),
    ("--echo-keys", "give keys with --key ID:file:FILE"),
    ("--parallel", "disks are copied with several threads already; leave it out"),
    ("--collect", "copy files out with `tranship shell -a DISK -i download`"),
    ("--collect-output", "copy files out with `tranship shell -a DISK -i download`"),
    ("--in-place", "convert to a new folder with -o local -os DIR"),
    ("--compressed", "compress the result afterwards with `qemu-img convert -c`"),
    ("--qemu-boot", "start the result with `tranship verify-boot`"),
    ("--password-file", NOT_WITH_FILES),
    ("--bandwidth", "limit the source or the network from outside"),
    ("--bandwidth-file", "limit the source or the network from outside"),
    ("--append-line", AFTERWARDS),
    ("--chmod", AFTERWARDS),
    ("--chown", AFTERWARDS),
    ("--commands-from-file", AFTERWARDS),
    ("--copy", AFTERWARDS),
    ("--copy-in", AFTERWARDS),
    ("--delete", AFTERWARDS),
    ("--edit", AFTERWARDS),
    ("--firstboot", AFTERWARDS),
    ("--firstboot-command", AFTERWARDS),
    ("--firstboot-install", AFTERWARDS),
    ("--hostname", AFTERWARDS),
    ("--install", AFTERWARDS),
    ("--link", AFTERWARDS),
    ("--mkdir", AFTERWARDS),
    ("--move", AFTERWARDS),
    ("--no-logfile", AFTERWARDS),
    ("--no-selinux-relabel", AFTERWARDS),
    ("--password", AFTERWARDS),
    ("--password-crypto", AFTERWARDS),
    ("--root-password", AFTERWARDS),
    ("--run", AFTERWARDS),
    ("--run-command", AFTERWARDS),
    ("--scrub", AFTERWARDS),
    ("--selinux-relabel", AFTERWARDS),
    ("--ssh-inject", AFTERWARDS),
    ("--tar-in", AFTERWARDS),
    ("--timezone", AFTERWARDS),
    ("--touch", AFTERWARDS),
    ("--truncate", AFTERWARDS),
    ("--truncate-recursive", AFTERWARDS),
    ("--uninstall", AFTERWARDS),
    ("--update", AFTERWARDS),
    ("--upload", AFTERWARDS),
    ("--write", AFTERWARDS),
];

/// Output modes (`-o`) that virt-v2v has.
const OUTPUTS: &[&str] = &[
    "glance",
    "kubevirt",
    "libvirt",
    "null",
    "openstack",
    "ovirt",
    "ovirt-upload",
    "qemu",
    "rhv",
    "rhv-upload",
    "vdsm",
];

/// The failure for an option that is known, but not there.
pub(super) fn option(word: &str) -> Option<Failure> {
    let name = word.split_once('=').map_or(word, |(name, _)| name);
    let family = ["--vddk-", "--vdsm-", "--sm-"].iter().any(|prefix| name.starts_with(prefix));
    let instead = OPTIONS.iter().find(|(known, _)| *known == name).map(|(_, instead)| *instead);
    let instead = instead.or(family.then_some(NOT_WITH_FILES))?;
    Some(
        Failure::usage(format!("{name} is an option of virt-v2v that is not there yet"))
            .hint(instead),
    )
}

/// What is wrong with an input mode that cannot be used.
pub(super) fn input(mode: &str) -> String {
    match mode {
        "libvirt" | "libvirtxml" => {
            format!("reading from {mode} is not there yet; what works: ova, vmx, disk")
        }
        _ => "expected ova, vmx or disk".to_owned(),
    }
}

/// What is wrong with an output mode that cannot be used.
pub(super) fn output(mode: &str) -> String {
    if OUTPUTS.contains(&mode) {
        format!("writing to {mode} is not there yet; what works: local, with -os DIR")
    } else {
        "expected local".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_options_say_what_works() {
        for (word, hint) in [
            ("-it", "-i ova"),
            ("--block-driver=virtio-scsi", "Windows"),
            ("--vddk-libdir", "leave it out"),
            ("--root-password", "tranship shell"),
        ] {
            let text = option(word).unwrap().render("p");
            let name = word.split('=').next().unwrap();
            assert!(text.contains(name) && text.contains(hint), "{text}");
        }
        assert!(option("--network").is_none());
        assert!(option("-of").is_none());
    }

    #[test]
    fn absent_options_are_not_defined_at_the_same_time() {
        let definition = crate::args::definition();
        let convert = definition.find_subcommand("convert").unwrap();
        for (word, _) in OPTIONS {
            let long = word.strip_prefix("--");
            let clash = long.is_some_and(|long| {
                convert.get_arguments().any(|argument| argument.get_long() == Some(long))
            });
            assert!(!clash, "{word} is defined");
        }
    }
}
