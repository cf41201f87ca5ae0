// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The text of a new descriptor.

use crate::SECTOR;
use crate::descriptor::NO_PARENT;
use crate::line::{Access, ExtentLine, ExtentType};
use crate::options::{Adapter, CreateOptions};
use std::fmt::{self, Write};

/// One GiB in sectors.
const GIB: u64 = (1 << 30) / SECTOR;

/// The descriptor of a new disk that consists of `extents`.
pub(crate) fn compose(options: &CreateOptions, cid: u32, extents: &[ExtentLine]) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(&mut text, options, cid, extents);
    text
}

fn write_all(
    text: &mut String,
    options: &CreateOptions,
    cid: u32,
    extents: &[ExtentLine],
) -> fmt::Result {
    let parent = options.parent.as_ref().map_or(NO_PARENT, |parent| parent.cid);
    writeln!(text, "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"")?;
    writeln!(text, "CID={cid:08x}\nparentCID={parent:08x}")?;
    writeln!(text, "createType=\"{}\"", options.subformat.word())?;
    if let Some(parent) = &options.parent {
        writeln!(text, "parentFileNameHint=\"{}\"", parent.name)?;
    }
    writeln!(text, "\n# Extent description")?;
    for line in extents {
        writeln!(text, "{}", extent_line(line))?;
    }
    let (cylinders, heads, sectors) = geometry(options.adapter, options.size.div_ceil(SECTOR));
    writeln!(text, "\n# The Disk Data Base\n#DDB\n")?;
    writeln!(text, "ddb.adapterType = \"{}\"", options.adapter.word())?;
    writeln!(text, "ddb.geometry.cylinders = \"{cylinders}\"")?;
    writeln!(text, "ddb.geometry.heads = \"{heads}\"")?;
    writeln!(text, "ddb.geometry.sectors = \"{sectors}\"")?;
    writeln!(text, "ddb.toolsVersion = \"{}\"", options.tools_version)?;
    writeln!(text, "ddb.virtualHWVersion = \"{}\"", options.hardware_version)
}

/// The line that lists an extent.
pub(crate) fn extent_line(line: &ExtentLine) -> String {
    let access = match line.access {
        Access::ReadWrite => "RW",
        Access::ReadOnly => "RDONLY",
        Access::None => "NOACCESS",
    };
    let sectors = line.len / SECTOR;
    let start = format!("{access} {sectors} {}", line.kind.word());
    match line.kind {
        ExtentType::Zero => start,
        // VMware writes no offset behind the name of a file on VMFS.
        ExtentType::Vmfs if line.offset == 0 => format!("{start} \"{}\"", line.name),
        ExtentType::Flat | ExtentType::Vmfs => {
            format!("{start} \"{}\" {}", line.name, line.offset / SECTOR)
        }
        _ => format!("{start} \"{}\"", line.name),
    }
}

/// Cylinders, heads and sectors per track that VMware gives a disk of that many sectors.
pub(crate) fn geometry(adapter: Adapter, sectors: u64) -> (u64, u64, u64) {
    let (heads, per_track, most): (u64, u64, u64) = match adapter {
        Adapter::Ide => (16, 63, 16383),
        _ if sectors < GIB => (64, 32, u64::MAX),
        _ if sectors < 2 * GIB => (128, 32, u64::MAX),
        _ => (255, 63, u64::MAX),
    };
    let cylinder = heads.saturating_mul(per_track);
    (sectors.checked_div(cylinder).unwrap_or(0).clamp(1, most), heads, per_track)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Descriptor, Subformat};

    #[test]
    fn what_is_composed_can_be_parsed() {
        let mut options = CreateOptions::new(3 << 30, Subformat::TwoGbMaxExtentFlat, "a b.vmdk");
        options.adapter = Adapter::LsiLogic;
        options.parent =
            Some(crate::ParentLink { name: "base \u{e4}.vmdk".to_owned(), cid: 0x1234 });
        let line = |name: &str, kind, offset| ExtentLine {
            access: Access::ReadWrite,
            len: 1 << 20,
            kind,
            name: name.to_owned(),
            offset,
        };
        let extents = [
            line("a b-f001.vmdk", ExtentType::Flat, 512),
            line("x", ExtentType::Vmfs, 0),
            line("y", ExtentType::Sparse, 0),
            line("", ExtentType::Zero, 0),
        ];
        let text = compose(&options, 0xab, &extents);
        let found = Descriptor::parse(text.as_bytes()).unwrap();
        assert_eq!(found.extents, extents);
        assert_eq!((found.cid, found.parent_cid), (Some(0xab), Some(0x1234)));
        assert_eq!(found.parent_hint.as_deref(), Some("base \u{e4}.vmdk"));
        assert_eq!(found.create_type, "twoGbMaxExtentFlat");
        assert_eq!(found.database["adaptertype"], "lsilogic");
        assert_eq!(found.database["geometry.cylinders"], "391");
        assert!(found.warnings.is_empty());
    }

    #[test]
    fn geometries() {
        let cases = [
            (Adapter::Ide, 1 << 10, (1, 16, 63)),
            (Adapter::Ide, 1 << 34, (16383, 16, 63)),
            (Adapter::BusLogic, 1 << 20, (512, 64, 32)),
            (Adapter::LsiLogic, 3 << 20, (768, 128, 32)),
            (Adapter::PvScsi, 1 << 24, (1044, 255, 63)),
        ];
        for (adapter, sectors, expected) in cases {
            assert_eq!(geometry(adapter, sectors), expected, "{adapter:?} {sectors}");
        }
    }
}
