// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `-L`: what another server offers, in qemu-nbd's words.

use super::encryption;
use super::settings::port;
use crate::args::ServeArgs;
use crate::failure::Failure;
use crate::nbd::asking::{Export, Protocol, Server};
use crate::stdout;
use std::fmt::Write;

/// Transmission flags by bit, as they are called here.
const FLAGS: [(u16, &str); 12] = [
    (1, "readonly"),
    (2, "flush"),
    (3, "fua"),
    (4, "rotational"),
    (5, "trim"),
    (6, "zeroes"),
    (7, "df"),
    (8, "multi"),
    (9, "resize"),
    (10, "cache"),
    (11, "fast-zero"),
    (12, "block-status-payload"),
];

/// Prints the exports of the server that the options name.
pub(super) fn run(args: &ServeArgs) -> Result<u8, Failure> {
    if !args.disks.is_empty() {
        return Err(Failure::usage("List mode is incompatible with a file name"));
    }
    let is_about_disks = args.export_name.is_some()
        || args.description.is_some()
        || args.offset.is_some()
        || args.connect.is_some()
        || args.disconnect.is_some()
        || args.format.is_some()
        || args.load_snapshot.is_some()
        || !args.bitmap.is_empty()
        || args.allocation_depth
        || args.nocache
        || ![&args.cache, &args.aio, &args.discard].iter().all(|modes| modes.is_empty());
    if is_about_disks {
        return Err(Failure::usage("List mode is incompatible with per-device settings"));
    }
    if args.fork || args.run.is_some() {
        return Err(Failure::usage("List mode is incompatible with forking"));
    }
    let tls = encryption::of_client(args)?;
    let path = args.socket.as_ref().or(args.unix.as_ref());
    let server = if let Some(path) = path {
        Server::at_socket(path)
    } else {
        let host = args.bind.as_deref().unwrap_or("127.0.0.1");
        Server::at_port(host, port(args.port.as_deref())?)
    };
    let (protocol, exports) = server.encrypted_with(tls).list()?;
    stdout::print(&text(protocol, &exports))?;
    Ok(0)
}

fn text(protocol: Protocol, exports: &[Export]) -> String {
    let mut text = format!("exports available: {}\n", exports.len());
    for export in exports {
        let mut line = |line: String| {
            text.push_str(&line);
            text.push('\n');
        };
        line(format!(" export: '{}'", export.name));
        if !export.description.is_empty() {
            line(format!("  description: {}", export.description));
        }
        line(format!("  size:  {}", export.size));
        let mut words = String::new();
        for (bit, word) in FLAGS {
            if export.flags & (1 << bit) != 0 {
                let _ = write!(words, " {word}");
            }
        }
        line(format!("  flags: {:#x} ({words} )", export.flags));
        if let Some([min, preferred, max]) = export.blocks {
            line(format!("  min block: {min}"));
            line(format!("  opt block: {preferred}"));
            line(format!("  max block: {max}"));
        }
        line(format!("  transaction size: {}-bit", if protocol.extended { 64 } else { 32 }));
        line(format!("  available meta contexts: {}", export.contexts.len()));
        for context in &export.contexts {
            line(format!("   {context}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_are_told_in_qemu_nbds_words() {
        let export = Export {
            name: "vda".to_owned(),
            description: "my disk".to_owned(),
            size: 67_108_864,
            flags: 0x1ded,
            blocks: Some([1, 4096, 33_554_432]),
            contexts: vec!["base:allocation".to_owned()],
        };
        let protocol = Protocol { tls: false, structured: true, extended: true };
        assert_eq!(
            text(protocol, &[export]),
            "exports available: 1\n \
             export: 'vda'\n  \
             description: my disk\n  \
             size:  67108864\n  \
             flags: 0x1ded ( flush fua trim zeroes df multi cache fast-zero \
             block-status-payload )\n  \
             min block: 1\n  \
             opt block: 4096\n  \
             max block: 33554432\n  \
             transaction size: 64-bit\n  \
             available meta contexts: 1\n   \
             base:allocation\n"
        );
    }
}
