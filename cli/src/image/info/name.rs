// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one name that stands for what a user said about an image.

use crate::image::json::{Json, Object};
use tranship_formats::{Format, Place, Spec};

/// The name of an image: a path or an address if they say all, or else `json:{…}`.
pub(super) fn shown(spec: &Spec, format: Format) -> String {
    let plain = plain(&spec.place);
    let mut options = Object::default();
    if let Some(slice) = spec.slice {
        options.set("offset", slice.offset.to_string());
        options.set_some("size", slice.size.map(|size| size.to_string()));
    }
    let key = if format == Format::Luks { "key-secret" } else { "encrypt.key-secret" };
    options.set_some(key, spec.key_secret.clone());
    if options == Object::default() {
        return plain;
    }
    let mut file = Object::default();
    file.set("driver", protocol(&spec.place)).set("filename", plain);
    options.set("driver", format.name()).set("file", file);
    format!("json:{}", Json::from(options).line())
}

/// The name that QEMU has for where the bytes are.
pub(super) fn protocol(place: &Place) -> &'static str {
    match place {
        Place::File(path) => by_kind(path),
        Place::Nbd(_) => "nbd",
        Place::Null { .. } => "null-co",
    }
}

/// A file, or a device of the host.
pub(super) fn by_kind(path: &std::path::Path) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::metadata(path) {
        Ok(facts) if facts.file_type().is_block_device() => "host_device",
        _ => "file",
    }
}

fn plain(place: &Place) -> String {
    match place {
        Place::File(path) => path.display().to_string(),
        Place::Null { .. } => "null-co://".to_owned(),
        Place::Nbd(address) => address.shown(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(options: &str) -> String {
        let spec = Spec::from_options(options).unwrap();
        shown(&spec, spec.format.unwrap_or(Format::Raw))
    }

    #[test]
    fn a_path_stands_for_itself_unless_more_was_said() {
        assert_eq!(name("driver=raw,file.driver=file,file.filename=c.raw"), "c.raw");
        assert_eq!(
            name("driver=raw,offset=4096,file.driver=file,file.filename=c.raw"),
            r#"json:{"offset": "4096", "driver": "raw", "file": {"driver": "file", "filename": "c.raw"}}"#
        );
        assert_eq!(
            name("driver=luks,key-secret=s,file.driver=file,file.filename=l"),
            r#"json:{"driver": "luks", "file": {"driver": "file", "filename": "l"}, "key-secret": "s"}"#
        );
        let nbd = Spec::from_name("nbd:unix:/tmp/s:exportname=x").unwrap();
        assert_eq!(shown(&nbd, Format::Raw), "nbd+unix:///x?socket=/tmp/s");
        let nbd = Spec::from_name("nbd://localhost").unwrap();
        assert_eq!(shown(&nbd, Format::Raw), "nbd://localhost:10809");
    }
}
