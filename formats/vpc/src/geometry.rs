// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Cylinders, heads and sectors: how old BIOSes count a disk (appendix of the VHD
//! specification).

use std::fmt;

/// Bytes of a sector; the format knows no other.
pub(crate) const SECTOR: u64 = 512;

/// `bytes` rounded up to whole sectors; down, where there is no such number.
pub(crate) fn whole_sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX / SECTOR * SECTOR)
}

/// The size of a disk as three numbers, whose product is a number of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads: tracks of a cylinder.
    pub heads: u8,
    /// Sectors of a track.
    pub sectors_per_track: u8,
}

impl Geometry {
    /// The largest one, which stands for "does not fit": the size is told elsewhere.
    pub const MAX: Self = Self { cylinders: 65_535, heads: 16, sectors_per_track: 255 };

    /// The geometry that the specification gives a disk of `size` bytes. Its product is
    /// `size` rounded down, as a rule by less than a cylinder.
    pub fn of(size: u64) -> Self {
        let sectors = (size / SECTOR).min(Self::MAX.sectors());
        let by = |sectors_per_track: u8, heads: u64| {
            let tracks = sectors.checked_div(u64::from(sectors_per_track)).unwrap_or(0);
            let cylinders = tracks.checked_div(heads).unwrap_or(0);
            Self {
                cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX),
                heads: u8::try_from(heads).unwrap_or(16),
                sectors_per_track,
            }
        };
        if sectors >= 65_535 * 16 * 63 {
            return by(255, 16);
        }
        let heads = (sectors / 17).div_ceil(1024).max(4);
        if heads <= 16 && sectors / 17 < heads.saturating_mul(1024) {
            return by(17, heads);
        }
        if sectors / 31 < 16 * 1024 {
            return by(31, 16);
        }
        by(63, 16)
    }

    /// The geometry that holds at least `size` bytes, for readers that believe nothing
    /// else; [`Self::MAX`] if none does.
    pub fn holding(size: u64) -> Self {
        // Raising by a track at a time meets each geometry with few steps: the product
        // lies at most one cylinder below its input.
        let mut raised = size;
        loop {
            let found = Self::of(raised);
            if found == Self::MAX || found.bytes() >= size {
                return found;
            }
            raised = raised.saturating_add(SECTOR);
        }
    }

    /// The product: sectors of the disk.
    pub fn sectors(self) -> u64 {
        u64::from(self.cylinders)
            .saturating_mul(u64::from(self.heads))
            .saturating_mul(u64::from(self.sectors_per_track))
    }

    /// Bytes of the disk.
    pub fn bytes(self) -> u64 {
        self.sectors().saturating_mul(SECTOR)
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.cylinders, self.heads, self.sectors_per_track)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries_are_those_of_other_writers() {
        // Size, geometry; as found in images of Hyper-V, VirtualBox and QEMU.
        let cases = [
            (41_943_040, (963, 5, 17)),
            (1 << 30, (2080, 16, 63)),
            (4_194_304, (120, 4, 17)),
            (1_079_296, (31, 4, 17)),
            (104_448, (3, 4, 17)),
            (0, (0, 4, 17)),
            (200 << 20, (825, 16, 31)),
            (2040 << 30, (65_535, 16, 255)),
            (u64::MAX, (65_535, 16, 255)),
        ];
        for (size, (cylinders, heads, sectors_per_track)) in cases {
            let expected = Geometry { cylinders, heads, sectors_per_track };
            assert_eq!(Geometry::of(size), expected, "{size}");
        }
    }

    #[test]
    fn a_holding_geometry_is_the_first_that_is_large_enough() {
        // As QEMU 10 rounds.
        for (size, rounded) in [(10 << 20, 10_514_432), (4 << 20, 4_212_736)] {
            assert_eq!(Geometry::holding(size).bytes(), rounded);
        }
        for size in [0, 512, 1 << 20, 511 << 20, 5 << 30, 126 << 30, 130 << 30, 3 << 40] {
            let found = Geometry::holding(size);
            assert!(found == Geometry::MAX || found.bytes() >= size, "{size}: {found}");
        }
    }
}
