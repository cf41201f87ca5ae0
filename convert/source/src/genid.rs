// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMware's two numbers for the VM generation id, as the UUID that KVM needs.

/// The UUID that shows a guest the same 16 bytes as VMware with these numbers does.
///
/// VMware puts both into memory as little-endian numbers; a UUID's first three fields are
/// little-endian in memory as well, its last eight bytes are in order.
pub(crate) fn from_vmware(genid: &str, genid_x: &str) -> Option<String> {
    let first: i64 = genid.trim().parse().ok()?;
    let second: i64 = genid_x.trim().parse().ok()?;
    if first == 0 && second == 0 {
        return None;
    }
    let first = first.cast_unsigned();
    let second = second.swap_bytes().cast_unsigned();
    let (low, middle, high) = (first & 0xffff_ffff, (first >> 32) & 0xffff, first >> 48);
    let (tail, node) = (second >> 48, second & 0xffff_ffff_ffff);
    Some(format!("{low:08x}-{middle:04x}-{high:04x}-{tail:04x}-{node:012x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_sees_the_same_bytes() {
        let genid = from_vmware("-8536691797830587195", "-1723453263670062919");
        assert_eq!(genid.unwrap(), "09512cc5-940a-8987-b950-f54f631015e8");
        assert_eq!(from_vmware("0", "0"), None);
        assert_eq!(from_vmware("x", "0"), None);
    }
}
