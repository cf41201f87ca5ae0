// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Values of options that several commands share.

use super::MachineReadable;
use crate::report::Channel;
use std::path::PathBuf;
use std::time::Duration;
use tranship_appliance::Preference;
use tranship_convert::Key;

/// The name of a backend.
pub(super) fn backend(text: &str) -> Result<Preference, String> {
    text.parse().map_err(|error: tranship_appliance::Error| error.to_string())
}

/// A number of seconds, also with `s` or `m` behind it.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix('m') {
        Some(number) => (number, 60),
        None => (text.strip_suffix('s').unwrap_or(text), 1),
    };
    match number.parse::<u32>() {
        Ok(count) if count > 0 => Ok(Duration::from_secs(u64::from(count) * unit)),
        _ => Err("expected a number of seconds such as 120, or minutes such as 5m".to_owned()),
    }
}

/// `ID:key:SECRET` or `ID:file:FILE`.
///
/// The messages never contain the value: it may be a secret.
pub(super) fn key(text: &str) -> Result<Key, String> {
    let mut parts = text.splitn(3, ':');
    let id = parts.next().filter(|id| !id.is_empty());
    let (Some(id), Some(kind)) = (id, parts.next()) else {
        return Err("expected ID:key:SECRET or ID:file:FILE".to_owned());
    };
    let secret = match (kind, parts.next()) {
        ("key", Some(secret)) => secret.as_bytes().to_vec(),
        ("file", Some(path)) => key_file(path)?,
        ("clevis", _) => {
            return Err("keys from Clevis are not there yet; give one with ID:file:FILE".to_owned());
        }
        _ => return Err("expected ID:key:SECRET or ID:file:FILE".to_owned()),
    };
    Ok(Key { id: id.to_owned(), secret })
}

/// The largest key file; cryptsetup's own limit is 8 MiB.
const KEY_LIMIT: u64 = 8 << 20;

fn key_file(path: &str) -> Result<Vec<u8>, String> {
    use std::io::Read;
    let file = std::fs::File::open(path).map_err(|error| format!("key file {path:?}: {error}"))?;
    let mut secret = Vec::new();
    file.take(KEY_LIMIT + 1)
        .read_to_end(&mut secret)
        .map_err(|error| format!("key file {path:?}: {error}"))?;
    if u64::try_from(secret.len()).unwrap_or(u64::MAX) > KEY_LIMIT {
        return Err(format!("key file {path:?} is larger than {KEY_LIMIT} bytes"));
    }
    // One newline at the end is the editor's, as virt-v2v has it.
    if secret.last() == Some(&b'\n') {
        secret.pop();
    }
    Ok(secret)
}

/// The value of `--machine-readable`, empty if it has none.
pub(super) fn machine_readable(text: &str) -> Result<MachineReadable, String> {
    let channel = match text.split_once(':') {
        None if text.is_empty() => return Ok(MachineReadable::Plain),
        Some(("file", path)) if !path.is_empty() => Channel::File(PathBuf::from(path)),
        Some(("stream", "stdout")) => Channel::Stdout,
        Some(("stream", "stderr")) => Channel::Stderr,
        Some(("fd", number)) => match number.parse() {
            Ok(number) if number > 0 => Channel::Descriptor(number),
            _ => return Err(format!("{number:?} is not the number of a descriptor")),
        },
        _ => {
            return Err("expected file:FILE, stream:stdout, stream:stderr or fd:N".to_owned());
        }
    };
    Ok(MachineReadable::Events(channel))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_colons_and_hide_secrets() {
        let found = key("/dev/sda2:key:a:b").unwrap();
        assert_eq!((found.id.as_str(), found.secret.as_slice()), ("/dev/sda2", &b"a:b"[..]));
        for wrong in ["geheim", ":key:geheim", "all:passwd:geheim", "all:clevis"] {
            let message = key(wrong).unwrap_err();
            assert!(!message.contains("geheim"), "{message}");
        }
    }

    #[test]
    fn a_key_file_loses_one_newline() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, b"\xff\x00x\n\n").unwrap();
        let found = key(&format!("all:file:{}", path.display())).unwrap();
        assert_eq!(found.secret, b"\xff\x00x\n");
        assert!(key("all:file:/nowhere/key").unwrap_err().contains("/nowhere/key"));
    }

    #[test]
    fn channels_are_named_as_in_virt_v2v() {
        let events = |channel| Ok(MachineReadable::Events(channel));
        assert_eq!(machine_readable(""), Ok(MachineReadable::Plain));
        assert_eq!(machine_readable("fd:5"), events(Channel::Descriptor(5)));
        assert_eq!(machine_readable("stream:stderr"), events(Channel::Stderr));
        assert_eq!(machine_readable("file:a:b"), events(Channel::File("a:b".into())));
        for wrong in ["x", "fd:", "fd:0", "stream:x", "file:"] {
            assert!(machine_readable(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(seconds("90"), Ok(Duration::from_secs(90)));
        assert_eq!(seconds("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(seconds("2m"), Ok(Duration::from_mins(2)));
        for wrong in ["0", "", "m", "-1", "1h"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
