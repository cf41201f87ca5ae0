// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--network`, `--bridge` and `--mac`: where the target's network cards are connected.

use tranship_convert::{NetworkRule, NetworkType};

/// `IN:OUT`, or `OUT` for all that no other rule names.
fn rule(kind: NetworkType, text: &str) -> Result<NetworkRule, String> {
    let (from, to) = match text.split_once(':') {
        Some((from, to)) => (Some(from), to),
        None => (None, text),
    };
    if to.is_empty() || from.is_some_and(str::is_empty) {
        return Err("expected IN:OUT or OUT, neither of them empty".to_owned());
    }
    Ok(NetworkRule::Name { kind, from: from.map(ToOwned::to_owned), to: to.to_owned() })
}

/// The value of `--network`.
pub(super) fn network(text: &str) -> Result<NetworkRule, String> {
    rule(NetworkType::Network, text)
}

/// The value of `--bridge`.
pub(super) fn bridge(text: &str) -> Result<NetworkRule, String> {
    rule(NetworkType::Bridge, text)
}

/// The value of `--mac`: `MAC:network|bridge:OUT`.
pub(super) fn mac(text: &str) -> Result<NetworkRule, String> {
    let expected = "expected MAC:network:NAME or MAC:bridge:NAME, such as \
                    52:54:00:12:34:56:bridge:br0";
    let (mac, rest) = text.split_at_checked(17).ok_or(expected)?;
    let groups: Vec<&str> = mac.split(':').collect();
    let is_mac = groups.len() == 6
        && groups
            .iter()
            .all(|group| group.len() == 2 && group.chars().all(|digit| digit.is_ascii_hexdigit()));
    let (kind, to) =
        rest.strip_prefix(':').and_then(|rest| rest.split_once(':')).ok_or(expected)?;
    let kind = match kind {
        _ if !is_mac || to.is_empty() => return Err(expected.to_owned()),
        "network" => NetworkType::Network,
        "bridge" => NetworkType::Bridge,
        "ip" => {
            return Err("static addresses (ip) are for Windows guests only, which are not \
                        converted yet; a Linux guest keeps the addresses that it has"
                .to_owned());
        }
        _ => return Err(expected.to_owned()),
    };
    Ok(NetworkRule::Mac { mac: mac.to_ascii_lowercase(), kind, to: to.to_owned() })
}

/// The first rule that says again what another one said about the same cards.
pub(super) fn duplicate(rules: &[NetworkRule]) -> Option<String> {
    let subject = |rule: &NetworkRule| match rule {
        NetworkRule::Name { kind, from, .. } => {
            let option = match kind {
                NetworkType::Network => "--network",
                NetworkType::Bridge => "--bridge",
            };
            match from {
                Some(from) => format!("{option} {from}:"),
                None => format!("{option} without a source name"),
            }
        }
        NetworkRule::Mac { mac, .. } => format!("--mac {mac}"),
    };
    let subjects: Vec<String> = rules.iter().map(subject).collect();
    let repeated = subjects
        .iter()
        .enumerate()
        .find(|(at, subject)| subjects.iter().take(*at).any(|s| s == *subject));
    repeated.map(|(_, subject)| subject.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_have_a_source_or_are_for_the_rest() {
        assert_eq!(
            network("VM Network:default"),
            Ok(NetworkRule::Name {
                kind: NetworkType::Network,
                from: Some("VM Network".into()),
                to: "default".into()
            })
        );
        assert_eq!(
            bridge("br0"),
            Ok(NetworkRule::Name { kind: NetworkType::Bridge, from: None, to: "br0".into() })
        );
        for wrong in ["", ":x", "x:"] {
            assert!(network(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn mac_rules_are_in_lower_case() {
        assert_eq!(
            mac("52:54:00:AB:cd:EF:bridge:br:0"),
            Ok(NetworkRule::Mac {
                mac: "52:54:00:ab:cd:ef".into(),
                kind: NetworkType::Bridge,
                to: "br:0".into()
            })
        );
        for wrong in [
            "",
            "52:54:00:12:34:56",
            "52:54:00:12:34:5g:network:x",
            "52:54:00:12:34:56:network:",
            "ééééééééééééééé",
        ] {
            assert!(mac(wrong).is_err(), "{wrong:?}");
        }
        assert!(mac("52:54:00:12:34:56:ip:10.0.0.1").unwrap_err().contains("Windows"));
    }

    #[test]
    fn saying_it_twice_is_found() {
        let rules = [network("a:b").unwrap(), bridge("a:b").unwrap(), network("c").unwrap()];
        assert_eq!(duplicate(&rules), None);
        let again = [rules[0].clone(), rules[1].clone(), network("a:c").unwrap()];
        assert_eq!(duplicate(&again).as_deref(), Some("--network a:"));
        let twice = [network("x").unwrap(), network("y").unwrap()];
        assert_eq!(duplicate(&twice).as_deref(), Some("--network without a source name"));
    }
}
