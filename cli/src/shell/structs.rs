// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attributes of files as text.

use tranship_protocol::{Attributes, FileKind};

/// The bits of `st_mode` that say what kind of file it is.
fn kind_bits(kind: FileKind) -> u32 {
    match kind {
        FileKind::Fifo => 0o010_000,
        FileKind::Character => 0o020_000,
        FileKind::Directory => 0o040_000,
        FileKind::Block => 0o060_000,
        FileKind::File => 0o100_000,
        FileKind::Link => 0o120_000,
        FileKind::Socket => 0o140_000,
    }
}

/// One field a line, with libguestfs's names.
pub(super) fn fields(found: &Attributes) -> String {
    let mode = kind_bits(found.kind) | (found.mode & 0o7777);
    format!(
        "dev: {}\nino: {}\nmode: {mode}\nnlink: {}\nuid: {}\ngid: {}\nsize: {}\nmtime: {}\n",
        found.device, found.inode, found.links, found.uid, found.gid, found.size, found.modified
    )
}

/// The ten letters at the beginning of a line of `ls -l`.
pub(super) fn mode_letters(found: &Attributes) -> String {
    let kind = match found.kind {
        FileKind::Fifo => 'p',
        FileKind::Character => 'c',
        FileKind::Directory => 'd',
        FileKind::Block => 'b',
        FileKind::File => '-',
        FileKind::Link => 'l',
        FileKind::Socket => 's',
    };
    let mut letters = String::from(kind);
    // Shift of the three bits, the special bit, its letter with and without x.
    for (shift, special, with, without) in
        [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let bits = found.mode >> shift;
        letters.push(if bits & 4 == 0 { '-' } else { 'r' });
        letters.push(if bits & 2 == 0 { '-' } else { 'w' });
        letters.push(match (found.mode & special != 0, bits & 1 != 0) {
            (true, true) => with,
            (true, false) => without,
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    letters
}

/// A line of `ls -l` without the name.
pub(super) fn long_line(found: &Attributes) -> String {
    let time = jiff::Timestamp::from_second(found.modified).map_or_else(
        |_| found.modified.to_string(),
        |time| time.strftime("%Y-%m-%d %H:%M").to_string(),
    );
    format!(
        "{} {:>3} {:>5} {:>5} {:>11} {time}",
        mode_letters(found),
        found.links,
        found.uid,
        found.gid,
        found.size
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(kind: FileKind, mode: u32) -> Attributes {
        Attributes {
            kind,
            mode,
            uid: 0,
            gid: 33,
            size: 12,
            links: 1,
            device: 5,
            inode: 7,
            modified: 86_400,
        }
    }

    #[test]
    fn modes_are_spelled_as_ls_does() {
        for (kind, mode, expected) in [
            (FileKind::File, 0o644, "-rw-r--r--"),
            (FileKind::Directory, 0o1777, "drwxrwxrwt"),
            (FileKind::File, 0o4755, "-rwsr-xr-x"),
            (FileKind::File, 0o2644, "-rw-r-Sr--"),
            (FileKind::Link, 0o777, "lrwxrwxrwx"),
            (FileKind::Socket, 0o1000, "s--------T"),
        ] {
            assert_eq!(mode_letters(&file(kind, mode)), expected);
        }
    }

    #[test]
    fn fields_have_libguestfs_names() {
        let text = fields(&file(FileKind::File, 0o644));
        assert!(text.contains("mode: 33188\n") && text.contains("mtime: 86400\n"), "{text}");
        let line = long_line(&file(FileKind::File, 0o644));
        assert!(line.ends_with("12 1970-01-02 00:00"), "{line}");
        let far = Attributes { modified: i64::MAX, ..file(FileKind::File, 0) };
        assert!(long_line(&far).ends_with(&i64::MAX.to_string()));
    }
}
