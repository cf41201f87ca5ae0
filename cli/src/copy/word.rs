// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the two words of a copy mean.

use crate::args::copy::bracketed;
use crate::failure::Failure;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use tranship_formats::{Format, Place, Spec};

/// One side of a copy as it was named.
#[derive(Debug)]
pub(super) struct Side {
    /// The name, for messages.
    pub(super) name: String,
    pub(super) place: Where,
    /// The format that was given for it.
    pub(super) format: Option<Format>,
}

impl Side {
    /// The failure with the side's name, unless it is in it already.
    pub(super) fn named(name: &str, failure: Failure) -> Failure {
        if failure.message().contains(name) { failure } else { failure.about(name) }
    }
}

/// Where the bytes of a side are.
#[derive(Debug)]
pub(super) enum Where {
    /// Standard input or output.
    Standard,
    /// Nowhere.
    Null,
    /// A server that has to be started.
    Program(Vec<OsString>),
    /// An export of a server.
    Server(Spec),
    /// A file, a device, a pipe.
    File(PathBuf),
    /// An image that is named with more than a path.
    Image(Spec),
}

/// Beginnings of names that are no paths.
const PROTOCOLS: &[&str] = &["nbd:", "nbds:", "nbd+", "nbds+", "json:", "tar:", "file:"];

impl Side {
    /// The source or, with `is_target`, the destination.
    pub(super) fn parse(
        word: &OsStr,
        format: Option<&str>,
        is_target: bool,
    ) -> Result<Self, Failure> {
        let format = format.map(|name| {
            name.parse().map_err(|_| Failure::usage(format!("Unknown driver '{name}'")))
        });
        let format = format.transpose()?;
        if let Some(command) = bracketed(word) {
            let program = command.first().ok_or_else(|| {
                Failure::usage("missing command name in [ ]: the server to be started")
            })?;
            let name = program.to_string_lossy().into_owned();
            return Ok(Self { name, place: Where::Program(command), format });
        }
        let name = word.to_string_lossy().into_owned();
        let place = match word.to_str() {
            Some("-") => Where::Standard,
            // As in nbdcopy, nothing can be read from there.
            Some("null:") if is_target => Where::Null,
            Some(text) if PROTOCOLS.iter().any(|start| text.starts_with(start)) => {
                let spec = Spec::from_name(text)?;
                // Without more in it than a path or an address, it is bytes.
                let plain = spec.format.is_none() && spec.member.is_none() && spec.slice.is_none();
                match &spec.place {
                    Place::Nbd(_) if plain => Where::Server(spec),
                    Place::File(path) if plain => Where::File(path.clone()),
                    _ => Where::Image(spec),
                }
            }
            _ => Where::File(Path::new(word).to_owned()),
        };
        Ok(Self { name, place, format })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(word: &str, is_target: bool) -> &'static str {
        match Side::parse(word.as_ref(), None, is_target).unwrap().place {
            Where::Standard => "standard",
            Where::Null => "null",
            Where::Program(_) => "program",
            Where::Server(_) => "server",
            Where::File(_) => "file",
            Where::Image(_) => "image",
        }
    }

    #[test]
    fn words_mean_what_they_mean_to_nbdcopy_and_images_as_well() {
        for (word, expected) in [
            ("-", "standard"),
            ("a", "file"),
            ("/dev/sda", "file"),
            // No protocol that anybody knows: a file.
            ("a:b", "file"),
            ("NBD", "file"),
            ("file:a", "file"),
            ("nbd://localhost", "server"),
            ("nbd+unix:///?socket=/s", "server"),
            ("nbd:localhost:10809", "server"),
            ("json:{\"driver\":\"qcow2\",\"file\":\"a\"}", "image"),
            ("json:{\"driver\":\"raw\",\"offset\":512,\"file\":\"a\"}", "image"),
            ("tar:a.ova", "image"),
            ("[\0nbdkit\0null", "program"),
        ] {
            assert_eq!(kind(word, false), expected, "{word}");
        }
        assert_eq!((kind("null:", false), kind("null:", true)), ("file", "null"));
        let failure = Side::parse("[".as_ref(), None, false).unwrap_err();
        assert!(failure.message().contains("missing command name"));
        let failure = Side::parse("a".as_ref(), Some("ntfs"), false).unwrap_err();
        assert_eq!(failure.message(), "Unknown driver 'ntfs'");
    }
}
