// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Network interfaces that the guest's configuration names.
//!
//! A light scan of every format in use. It serves one question: which interface names
//! must still exist after the move? What it does not understand it leaves out.

use crate::Result;
use crate::facts::path_text;
use crate::reader::{Reader, assignment, ini};
use serde::Serialize;
use tranship_protocol::GuestPath;

/// Configured network interfaces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Network {
    /// Configuration of one interface each, in the order of the files.
    pub configs: Vec<NetConfig>,
    /// Names that a udev rule or a `.link` file already gives.
    pub pinned: Vec<PinnedName>,
    /// Whether the kernel's own names stay (`net.ifnames=0` on the command line).
    pub kernel_names: bool,
}

/// Configuration of one interface in one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetConfig {
    /// Name of the interface; `None` if the file goes by hardware address alone.
    pub interface: Option<String>,
    /// Where it is configured.
    #[serde(serialize_with = "path_text")]
    pub file: GuestPath,
    /// Addresses that do not come from DHCP.
    pub static_addresses: Vec<String>,
    /// Hardware address that the file names, in lower case.
    pub mac: Option<String>,
}

/// A name that a udev rule or a `.link` file gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PinnedName {
    /// The name.
    pub name: String,
    /// The hardware address that gets it, in lower case, if the file goes by that.
    pub mac: Option<String>,
    /// The file.
    #[serde(serialize_with = "path_text")]
    pub file: GuestPath,
}

/// Whether a file of this name is configuration.
type Belongs = fn(&str) -> bool;
/// Reads one file of a format.
type Scan = fn(&str, &GuestPath) -> Vec<NetConfig>;

/// Looks at every place where interfaces are configured.
pub(crate) fn network<'a>(
    reader: &Reader<'_>,
    arguments: impl IntoIterator<Item = &'a str>,
) -> Result<Network> {
    let mut configs = Vec::new();
    for path in interfaces_files(reader)? {
        if let Some(text) = reader.text(path.clone())? {
            configs.extend(interfaces(&text, &path));
        }
    }
    let places: [(&str, Belongs, Scan); 5] = [
        ("/etc/netplan", |name| name.ends_with(".yaml") || name.ends_with(".yml"), netplan),
        ("/etc/NetworkManager/system-connections", |name| !name.starts_with('.'), keyfile),
        ("/etc/systemd/network", |name| name.ends_with(".network"), networkd),
        ("/etc/sysconfig/network-scripts", is_ifcfg, ifcfg),
        ("/etc/sysconfig/network", is_ifcfg, ifcfg),
    ];
    for (directory, belongs, scan) in places {
        for name in reader.names(directory)? {
            let path = GuestPath::of(directory).join(&name);
            if belongs(&name)
                && let Some(text) = reader.text(path.clone())?
            {
                configs.extend(scan(&text, &path));
            }
        }
    }
    let mut kernel_names = arguments.into_iter().any(|argument| argument == "net.ifnames=0");
    // The documented ways of switching predictable names off.
    for path in
        ["/etc/systemd/network/99-default.link", "/etc/udev/rules.d/80-net-setup-link.rules"]
    {
        kernel_names |= reader.link(path)?.as_deref() == Some("/dev/null");
    }
    Ok(Network { configs, pinned: pinned(reader)?, kernel_names })
}

fn is_ifcfg(name: &str) -> bool {
    name.starts_with("ifcfg-")
        && !name.ends_with('~')
        && !name.contains(".rpm")
        && !name.ends_with(".bak")
}

fn interfaces_files(reader: &Reader<'_>) -> Result<Vec<GuestPath>> {
    let mut files = vec![GuestPath::of("/etc/network/interfaces")];
    for directory in ["/etc/network/interfaces.d", "/run/network/interfaces.d"] {
        for name in reader.names(directory)? {
            files.push(GuestPath::of(directory).join(name));
        }
    }
    Ok(files)
}

/// `interfaces(5)`: `iface NAME inet METHOD` and the options below it.
fn interfaces(text: &str, file: &GuestPath) -> Vec<NetConfig> {
    let mut found: Vec<NetConfig> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (words.as_slice(), found.last_mut()) {
            (["iface", name, ..], _) => found.push(NetConfig {
                interface: Some((*name).to_owned()),
                file: file.clone(),
                static_addresses: Vec::new(),
                mac: None,
            }),
            (["address", address, ..], Some(last)) => {
                last.static_addresses.push((*address).to_owned());
            }
            (["hwaddress", "ether", mac, ..] | ["hwaddress", mac, ..], Some(last)) => {
                last.mac = mac_address(mac);
            }
            _ => {}
        }
    }
    found
}

/// Netplan: the keys right below `ethernets:`, with their `match`, `set-name`, `addresses`.
fn netplan(text: &str, file: &GuestPath) -> Vec<NetConfig> {
    struct Block {
        config: NetConfig,
        matched: bool,
    }
    let mut found: Vec<Block> = Vec::new();
    let mut section: Option<usize> = None;
    let mut level: Option<usize> = None;
    let mut in_addresses = None;
    let mut in_name_servers = None;
    for line in text.lines() {
        let line = line.split(" #").next().unwrap_or_default();
        let body = line.trim();
        if body.is_empty() || body.starts_with('#') {
            continue;
        }
        let indent = line.len().saturating_sub(line.trim_start().len());
        let (key, value) = body.split_once(':').unwrap_or((body, ""));
        let (key, value) = (unquoted(key), unquoted(value));
        if section.is_some_and(|at| indent <= at) {
            (section, level) = (None, None);
        }
        let Some(at) = section else {
            if key == "ethernets" {
                section = Some(indent);
            }
            continue;
        };
        if indent > at && level.is_none_or(|level| indent == level) && !body.starts_with('-') {
            level = Some(indent);
            in_addresses = None;
            found.push(Block {
                config: NetConfig {
                    interface: Some(key.to_owned()),
                    file: file.clone(),
                    static_addresses: Vec::new(),
                    mac: None,
                },
                matched: false,
            });
            continue;
        }
        if in_name_servers.is_some_and(|from| indent > from) {
            continue;
        }
        in_name_servers = (key == "nameservers").then_some(indent);
        let Some(block) = found.last_mut() else { continue };
        if in_addresses
            .is_some_and(|from| indent < from || (indent == from && !body.starts_with('-')))
        {
            in_addresses = None;
        }
        match (key, body.strip_prefix('-')) {
            (_, Some(item)) if in_addresses.is_some() => {
                block.config.static_addresses.push(unquoted(item).trim_end_matches(':').to_owned());
            }
            ("match", _) => block.matched = true,
            ("macaddress", _) => block.config.mac = mac_address(value),
            ("set-name", _) => {
                block.config.interface = Some(value.to_owned());
                block.matched = false;
            }
            // The name of a match is the interface's, unless it is a pattern.
            ("name", _) if block.matched && !value.contains(['*', '?', '[']) => {
                block.config.interface = Some(value.to_owned());
                block.matched = false;
            }
            ("addresses", _) if value.starts_with('[') => {
                let list = value.trim_matches(['[', ']']).split(',').map(unquoted);
                block
                    .config
                    .static_addresses
                    .extend(list.filter(|a| !a.is_empty()).map(str::to_owned));
            }
            ("addresses", _) => in_addresses = Some(indent),
            _ => {}
        }
    }
    found
        .into_iter()
        .map(|block| {
            let mut config = block.config;
            if block.matched {
                config.interface = None;
            }
            config
        })
        .collect()
}

fn unquoted(text: &str) -> &str {
    text.trim().trim_matches(['"', '\''])
}

/// NetworkManager's keyfiles.
fn keyfile(text: &str, file: &GuestPath) -> Vec<NetConfig> {
    let mut config =
        NetConfig { interface: None, file: file.clone(), static_addresses: Vec::new(), mac: None };
    let mut ethernet = false;
    for (section, key, value) in ini(text) {
        match (section, key) {
            ("connection", "type") => ethernet = matches!(value, "ethernet" | "802-3-ethernet"),
            ("connection", "interface-name") => config.interface = Some(value.to_owned()),
            ("ethernet" | "802-3-ethernet", "mac-address") => config.mac = mac_address(value),
            ("ipv4" | "ipv6", key) if key.starts_with("address") && key != "address-data" => {
                let address = value.split([',', ';']).next().unwrap_or_default();
                config.static_addresses.push(address.to_owned());
            }
            _ => {}
        }
    }
    if ethernet { vec![config] } else { Vec::new() }
}

/// systemd's `.network` files.
fn networkd(text: &str, file: &GuestPath) -> Vec<NetConfig> {
    let mut names = Vec::new();
    let mut mac = None;
    let mut addresses = Vec::new();
    for (section, key, value) in ini(text) {
        match (section, key) {
            ("Match", "Name") => names.extend(
                value.split_whitespace().filter(|name| !name.contains(['*', '?', '[', '!'])),
            ),
            ("Match", "MACAddress" | "PermanentMACAddress") => mac = mac_address(value),
            ("Network" | "Address", "Address") => addresses.push(value.to_owned()),
            _ => {}
        }
    }
    let config = |interface: Option<&str>| NetConfig {
        interface: interface.map(str::to_owned),
        file: file.clone(),
        static_addresses: addresses.clone(),
        mac: mac.clone(),
    };
    if names.is_empty() && mac.is_some() {
        return vec![config(None)];
    }
    names.iter().map(|name| config(Some(name))).collect()
}

/// `ifcfg-*` of Red Hat and SUSE.
fn ifcfg(text: &str, file: &GuestPath) -> Vec<NetConfig> {
    let suffix = String::from_utf8_lossy(file.file_name()).into_owned();
    let value = |key: &str| assignment(text, key).filter(|value| !value.is_empty());
    let mac = value("HWADDR").and_then(mac_address);
    let interface = value("DEVICE")
        .map(str::to_owned)
        .or_else(|| suffix.strip_prefix("ifcfg-").filter(|_| mac.is_none()).map(str::to_owned));
    let addresses = ["IPADDR", "IPADDR0", "IPADDR1", "IPADDR_0", "IPADDR_1", "IPV6ADDR"];
    vec![NetConfig {
        interface,
        file: file.clone(),
        static_addresses: addresses.into_iter().filter_map(value).map(str::to_owned).collect(),
        mac,
    }]
}

fn pinned(reader: &Reader<'_>) -> Result<Vec<PinnedName>> {
    let mut found = Vec::new();
    for name in reader.names("/etc/systemd/network")? {
        let file = GuestPath::of("/etc/systemd/network").join(&name);
        if !name.ends_with(".link") {
            continue;
        }
        let Some(text) = reader.text(file.clone())? else { continue };
        let value = |keys: &[&str]| {
            let found = ini(&text).find(|(_, key, _)| keys.contains(key));
            found.map(|(_, _, value)| value.to_owned())
        };
        if let Some(name) = value(&["Name"]) {
            let mac =
                value(&["MACAddress", "PermanentMACAddress"]).as_deref().and_then(mac_address);
            found.push(PinnedName { name, mac, file });
        }
    }
    for rules in reader.names("/etc/udev/rules.d")? {
        let file = GuestPath::of("/etc/udev/rules.d").join(&rules);
        if !rules.ends_with(".rules") {
            continue;
        }
        let text = reader.text(file.clone())?.unwrap_or_default();
        for line in text.lines().filter(|line| !line.trim_start().starts_with('#')) {
            let value = |key: &str| Some(line.split_once(key)?.1.split('"').next()?.to_owned());
            if let (true, Some(name)) =
                (line.contains("\"net\""), value(" NAME=\"").or_else(|| value(",NAME=\"")))
            {
                let mac = value("address}==\"").as_deref().and_then(mac_address);
                found.push(PinnedName { name, mac, file: file.clone() });
            }
        }
    }
    Ok(found)
}

/// Six bytes in hexadecimal, in lower case with colons.
pub fn mac_address(text: &str) -> Option<String> {
    let text = unquoted(text).replace('-', ":").to_ascii_lowercase();
    let parts: Vec<&str> = text.split(':').collect();
    let valid = |part: &&str| part.len() == 2 && part.chars().all(|c| c.is_ascii_hexdigit());
    (parts.len() == 6 && parts.iter().all(valid)).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Want<'a> = &'a [(Option<&'a str>, &'a [&'a str], Option<&'a str>)];

    fn check(found: &[NetConfig], want: Want<'_>) {
        let found: Vec<_> = found
            .iter()
            .map(|c| (c.interface.as_deref(), c.static_addresses.clone(), c.mac.as_deref()))
            .collect();
        let want: Vec<_> = want
            .iter()
            .map(|(name, addresses, mac)| {
                (*name, addresses.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>(), *mac)
            })
            .collect();
        assert_eq!(found, want);
    }

    #[test]
    fn every_format_names_its_interfaces() {
        let file = GuestPath::of("/x");
        check(
            &interfaces(
                "auto lo\niface lo inet loopback\nallow-hotplug ens192\niface ens192 inet static\n\
                 \taddress 10.0.0.5/24\n\thwaddress ether 00:50:56:AA:bb:01\n",
                &file,
            ),
            &[
                (Some("lo"), &[], None),
                (Some("ens192"), &["10.0.0.5/24"], Some("00:50:56:aa:bb:01")),
            ],
        );
        check(
            &netplan(
                "network:\n  version: 2\n  ethernets:\n    ens160:\n      addresses:\n      - 10.0.0.6/24\n      \
                 - \"10.0.0.7/24\"\n      nameservers:\n        addresses: [1.1.1.1]\n    lan:\n      match:\n        \
                 macaddress: 00:0C:29:00:00:01\n      set-name: ens192\n    any:\n      match:\n        \
                 macaddress: '00:0c:29:00:00:02'\n      dhcp4: true\n  bridges:\n    br0: {}\n",
                &file,
            ),
            &[
                (Some("ens160"), &["10.0.0.6/24", "10.0.0.7/24"], None),
                (Some("ens192"), &[], Some("00:0c:29:00:00:01")),
                (None, &[], Some("00:0c:29:00:00:02")),
            ],
        );
        check(
            &keyfile(
                "[connection]\nid=x\ntype=ethernet\ninterface-name=ens33\n[ipv4]\nmethod=manual\naddress1=10.0.0.8/24,10.0.0.1\n",
                &file,
            ),
            &[(Some("ens33"), &["10.0.0.8/24"], None)],
        );
        check(&keyfile("[connection]\ntype=bridge\ninterface-name=br0\n", &file), &[]);
        check(
            &networkd("[Match]\nName=ens1 en*\n[Network]\nAddress=10.0.0.9/24\n", &file),
            &[(Some("ens1"), &["10.0.0.9/24"], None)],
        );
        check(
            &ifcfg("DEVICE=\"eth0\"\nHWADDR=00:50:56:00:00:01\nIPADDR=10.1.1.1\n", &file),
            &[(Some("eth0"), &["10.1.1.1"], Some("00:50:56:00:00:01"))],
        );
        check(
            &ifcfg("BOOTPROTO=dhcp\n", &GuestPath::of("/e/ifcfg-ens3")),
            &[(Some("ens3"), &[], None)],
        );
    }

    #[test]
    fn hardware_addresses_are_normal_or_nothing() {
        assert_eq!(mac_address("\"00-50-56-AA-BB-CC\"").as_deref(), Some("00:50:56:aa:bb:cc"));
        for bad in ["", "00:50:56:aa:bb", "00:50:56:aa:bb:zz", "permanent", "0:50:56:aa:bb:cc"] {
            assert_eq!(mac_address(bad), None, "{bad}");
        }
    }
}
