// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The osinfo database's URLs, which management tools know operating systems by.

/// Short id of a family, and what its URL has before the version.
const FAMILIES: [(&str, &str); 12] = [
    ("debian", "http://debian.org/debian/"),
    ("ubuntu", "http://ubuntu.com/ubuntu/"),
    ("rhel", "http://redhat.com/rhel/"),
    ("centos-stream", "http://centos.org/centos-stream/"),
    ("centos", "http://centos.org/centos/"),
    ("rocky", "http://rockylinux.org/rocky/"),
    ("almalinux", "http://almalinux.org/almalinux/"),
    ("fedora", "http://fedoraproject.org/fedora/"),
    ("opensuse", "http://opensuse.org/opensuse/"),
    ("ol", "http://oracle.com/ol/"),
    ("alpinelinux", "http://alpinelinux.org/alpinelinux/"),
    ("win", "http://microsoft.com/win/"),
];

/// Ids that follow no rule.
const SINGLE: [(&str, &str); 4] = [
    ("archlinux", "http://archlinux.org/archlinux/rolling"),
    ("opensusetumbleweed", "http://opensuse.org/opensuse/tumbleweed"),
    ("winvista", "http://microsoft.com/win/vista"),
    ("winxp", "http://microsoft.com/win/xp"),
];

/// Oldest version of a family whose minor releases the database does not tell apart.
const WITHOUT_MINOR: [(&str, u32); 2] = [("rocky", 8), ("almalinux", 8)];

/// The URL for a short id: `http://debian.org/debian/12` for `debian12`.
///
/// `None` for anything else than the well-known families, since a URL that the database
/// does not have is worse than none.
pub(crate) fn osinfo_url(short_id: &str) -> Option<String> {
    if let Some((_, url)) = SINGLE.iter().find(|(id, _)| *id == short_id) {
        return Some((*url).to_owned());
    }
    if let Some(version) = short_id.strip_prefix("sles") {
        // sles12 is /12, sles12sp5 is /12.5.
        let (major, pack) = version.split_once("sp").unwrap_or((version, ""));
        let dot = if pack.is_empty() { "" } else { "." };
        let url = format!("http://suse.com/sles/{major}{dot}{pack}");
        return (is_number(major) && (pack.is_empty() || is_number(pack))).then_some(url);
    }
    let (family, version, url) = FAMILIES.iter().find_map(|(family, url)| {
        let version = short_id.strip_prefix(family)?;
        version.starts_with(|first: char| first.is_ascii_digit()).then_some((family, version, url))
    })?;
    let plain = |letter: char| letter.is_ascii_digit() || letter == '.';
    let windows = |letter: char| plain(letter) || matches!(letter, 'k' | 'r');
    if !version.chars().all(|letter| if *family == "win" { windows(letter) } else { plain(letter) })
    {
        return None;
    }
    let major = version.split_once('.').map_or(version, |(major, _)| major);
    let drops_minor = WITHOUT_MINOR.iter().any(|(name, oldest)| {
        name == family && major.parse::<u32>().is_ok_and(|major| major >= *oldest)
    });
    Some(format!("{url}{}", if drops_minor { major } else { version }))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|letter| letter.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_families_have_urls_and_others_none() {
        let table: [(&str, Option<&str>); 20] = [
            ("debian12", Some("http://debian.org/debian/12")),
            ("ubuntu22.04", Some("http://ubuntu.com/ubuntu/22.04")),
            ("rhel9.4", Some("http://redhat.com/rhel/9.4")),
            ("centos-stream9", Some("http://centos.org/centos-stream/9")),
            ("centos7.0", Some("http://centos.org/centos/7.0")),
            ("rocky9.3", Some("http://rockylinux.org/rocky/9")),
            ("almalinux9", Some("http://almalinux.org/almalinux/9")),
            ("fedora40", Some("http://fedoraproject.org/fedora/40")),
            ("sles15", Some("http://suse.com/sles/15")),
            ("sles15sp5", Some("http://suse.com/sles/15.5")),
            ("opensuse15.5", Some("http://opensuse.org/opensuse/15.5")),
            ("opensusetumbleweed", Some("http://opensuse.org/opensuse/tumbleweed")),
            ("archlinux", Some("http://archlinux.org/archlinux/rolling")),
            ("ol8.9", Some("http://oracle.com/ol/8.9")),
            ("win2k12r2", Some("http://microsoft.com/win/2k12r2")),
            ("", None),
            ("debian", None),
            ("debian12'/>", None),
            ("slesx", None),
            ("plan9", None),
        ];
        for (id, url) in table {
            assert_eq!(osinfo_url(id).as_deref(), url, "{id}");
        }
    }
}
