// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The anti-forensic splitter: a key spread over so many bytes that losing a few of them
//! loses the key (LUKS1 specification, section 2.4).

use crate::derive::Hash;
use zeroize::Zeroizing;

/// The key of `key_bytes` bytes that `material`, stripe after stripe, holds.
pub(crate) fn merge(material: &[u8], key_bytes: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0_u8; key_bytes]);
    let mut stripes = material.chunks_exact(key_bytes.max(1)).peekable();
    while let Some(stripe) = stripes.next() {
        for (byte, other) in key.iter_mut().zip(stripe) {
            *byte ^= other;
        }
        // The last stripe is what makes the sum of all the key: nothing follows it.
        if stripes.peek().is_some() {
            diffuse(&mut key, hash);
        }
    }
    key
}

/// Replaces each hash-sized block of `key` by the hash of its number and itself.
fn diffuse(key: &mut [u8], hash: Hash) {
    for (number, block) in (0_u32..).zip(key.chunks_mut(hash.len())) {
        let new = hash.of(&[&number.to_be_bytes(), block]);
        for (byte, new) in block.iter_mut().zip(new.iter()) {
            *byte = *new;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitting_and_merging_gives_the_key() {
        let key: Vec<u8> = (1..=40).collect();
        let stripes = 7;
        // The splitter: all stripes but the last are arbitrary.
        let mut material = tranship_format_testing::pattern(key.len() * (stripes - 1), 3);
        let mut sum = vec![0; key.len()];
        for stripe in material.chunks(key.len()) {
            sum.iter_mut().zip(stripe).for_each(|(a, b)| *a ^= b);
            diffuse(&mut sum, Hash::Sha256);
        }
        material.extend(sum.iter().zip(&key).map(|(a, b)| a ^ b));
        assert_eq!(*merge(&material, key.len(), Hash::Sha256), key);
    }
}
