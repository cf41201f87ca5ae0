// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Names of network cards: what the configuration calls them they stay.
//!
//! A predictable name such as `ens192` is made from the slot of the old machine. Files of
//! udev that go by hardware address, which is kept, make every configuration hold.

use crate::draft::{Draft, PLAIN};
use crate::machine::{MachineFacts, Nic};
use crate::plan::DeviceChange;
use std::collections::BTreeMap;
use tranship_inspect::{Facts, Init, Result, mac_address};
use tranship_protocol::GuestPath;

const WHY: &str = "the card keeps its name, so that its configuration still applies";

/// Fixes the names; returns the `.link` files, by path, for the initramfs.
pub(crate) fn plan(
    draft: &mut Draft<'_>,
    facts: &Facts,
    machine: &MachineFacts,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let fixed = names(draft, facts, &machine.nics);
    let mut links = BTreeMap::new();
    // udev reads .link files from systemd 209 on.
    let by_link = match facts.os.init {
        Init::Systemd { version } => version.is_none_or(|version| version >= 209),
        _ => false,
    };
    let mut rules = Vec::new();
    for (mac, name) in &fixed {
        if by_link {
            let path = format!("/etc/systemd/network/10-tranship-{name}.link");
            let content = link_file(facts, mac, name).into_bytes();
            draft.write(&GuestPath::of(&path), content.clone(), PLAIN, WHY)?;
            links.insert(path, content);
        } else {
            rules.push(format!(
                "SUBSYSTEM==\"net\", ACTION==\"add\", ATTR{{address}}==\"{mac}\", \
                 ATTR{{type}}==\"1\", NAME=\"{name}\"\n"
            ));
        }
    }
    if !rules.is_empty() {
        let path = GuestPath::of("/etc/udev/rules.d/70-persistent-net.rules");
        let mut content = draft.content(&path)?.unwrap_or_default();
        if content.last().is_some_and(|byte| *byte != b'\n') {
            content.push(b'\n');
        }
        content.extend_from_slice(b"# Names from before the move to KVM.\n");
        content.extend_from_slice(rules.concat().as_bytes());
        draft.write(&path, content, PLAIN, WHY)?;
    }
    for nic in &machine.nics {
        let mac = mac_address(&nic.mac).unwrap_or_else(|| nic.mac.clone());
        let name = fixed.get(&mac).cloned();
        draft.plan.devices.push(DeviceChange::Nic { mac, name });
    }
    // A file of an earlier conversion still belongs into an initramfs made since then.
    for pinned in &facts.network.pinned {
        if pinned.file.file_name().starts_with(b"10-tranship-")
            && let Some(content) = draft.content(&pinned.file)?
        {
            links.insert(pinned.file.to_text(), content);
        }
    }
    Ok(links)
}

fn link_file(facts: &Facts, mac: &str, name: &str) -> String {
    // PermanentMACAddress= is known from systemd 245 on. Before, a bridge or VLAN with the
    // same address could match as well, which the driver's name prevents.
    let matches = match facts.os.init {
        Init::Systemd { version: Some(version) } if version >= 245 => {
            format!("PermanentMACAddress={mac}\n")
        }
        _ => format!("MACAddress={mac}\nDriver=virtio_net\n"),
    };
    format!(
        "# The guest's configuration calls this card {name}, a name that comes from the\n\
         # hardware before the move to KVM.\n\
         [Match]\n{matches}\n[Link]\nName={name}\n"
    )
}

/// Which card (by its address) gets which name.
fn names(draft: &mut Draft<'_>, facts: &Facts, nics: &[Nic]) -> BTreeMap<String, String> {
    let mut fixed = BTreeMap::new();
    let mut free: Vec<(String, Option<u32>)> =
        nics.iter().filter_map(|nic| Some((mac_address(&nic.mac)?, nic.slot))).collect();
    for pinned in &facts.network.pinned {
        free.retain(|(mac, _)| pinned.mac.as_ref() != Some(mac));
    }
    let is_pinned = |name: &str| facts.network.pinned.iter().any(|pinned| pinned.name == name);
    let mut wanted: Vec<&str> = Vec::new();
    for config in &facts.network.configs {
        let Some(name) = config.interface.as_deref().filter(|name| is_card(name)) else { continue };
        if is_pinned(name) || fixed.values().any(|known| known == name) {
            continue;
        }
        match config.mac.as_ref().and_then(|mac| free.iter().position(|(free, _)| free == mac)) {
            Some(at) => {
                fixed.insert(free.remove(at).0, name.to_owned());
                wanted.retain(|known| *known != name);
            }
            None if !wanted.contains(&name) => wanted.push(name),
            None => {}
        }
    }
    // The kernel hands these names out itself, and to a single card always the first.
    if facts.network.kernel_names && nics.len() < 2 {
        wanted.retain(|name| !name.starts_with("eth"));
    }
    wanted.sort_by_key(|name| natural(name));
    wanted.retain(|name| {
        let slot: Option<u32> = name.strip_prefix("ens").and_then(|digits| digits.parse().ok());
        match slot.and_then(|slot| free.iter().position(|(_, free)| *free == Some(slot))) {
            Some(at) => {
                fixed.insert(free.remove(at).0, (*name).to_owned());
                false
            }
            None => true,
        }
    });
    let ambiguous = wanted.len() > 1 || (wanted.len() == 1 && free.len() > 1);
    let mut free = free.into_iter();
    for name in wanted {
        let Some((mac, _)) = free.next() else {
            let what =
                format!("the guest configures {name}, but the machine has no card left for it");
            draft.warn("interface-without-card", what);
            continue;
        };
        if ambiguous {
            let what = format!("{name} is taken to be the card {mac}, by order alone");
            draft.warn("interface-guessed", what);
        }
        fixed.insert(mac, name.to_owned());
    }
    fixed
}

/// Whether the name is one of a wired card, and not a bridge, VLAN, bond or alias.
fn is_card(name: &str) -> bool {
    let wired =
        ["eth", "eno", "ens", "enp", "enx", "enX", "em"].iter().any(|p| name.starts_with(p));
    wired && name.len() < 16 && name.chars().all(|c| c.is_ascii_alphanumeric())
}

/// Text and number apart, so that `ens9` sorts before `ens10`.
fn natural(name: &str) -> (String, u64, String) {
    let text: String = name.chars().take_while(|c| !c.is_ascii_digit()).collect();
    let digits: String =
        name.chars().skip(text.chars().count()).take_while(char::is_ascii_digit).collect();
    (text, digits.parse().unwrap_or(0), name.to_owned())
}
