// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is told about a LUKS header.

use crate::image::json::{Json, Object};
use tranship_luks::{Header, Kdf, KeySlot};

/// The facts that need no passphrase.
pub(super) fn described(header: &Header) -> Object {
    let (mode, vector) = header.mode.split_once('-').unwrap_or((&header.mode, ""));
    let mut object = Object::default();
    object
        .set("ivgen-alg", vector.split(':').next().unwrap_or(vector))
        .set_some("ivgen-hash-alg", vector.split_once(':').map(|(_, hash)| hash))
        .set("detached-header", false)
        .set("hash-alg", header.hash.as_str())
        .set("cipher-alg", cipher(header, mode))
        .set("uuid", header.uuid.as_str())
        .set("cipher-mode", mode)
        .set("slots", header.slots.iter().map(slot).collect::<Vec<_>>())
        .set("payload-offset", header.payload_offset)
        .set("master-key-iters", header.digest_iterations());
    object
}

/// The name that QEMU has for a cipher with its key: XTS has two keys in one.
fn cipher(header: &Header, mode: &str) -> String {
    let bits = header.key_bytes.saturating_mul(8);
    let bits = if mode == "xts" { bits / 2 } else { bits };
    format!("{}-{bits}", header.cipher)
}

fn slot(slot: &KeySlot) -> Json {
    let mut object = Object::default();
    object.set("active", slot.active).set("key-offset", slot.area_offset);
    if slot.active {
        if let Kdf::Pbkdf2 { iterations, .. } = slot.kdf {
            object.set("iters", iterations);
        }
        object.set("stripes", slot.stripes);
    }
    object.into()
}
