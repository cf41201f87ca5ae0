// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use proptest::prelude::*;
use tranship_block::ErrorKind;

fn tcp_at(host: &str, port: u16) -> Address {
    Address::Tcp { host: host.to_owned(), port }
}

fn unix_at(path: &str) -> Address {
    Address::Unix(path.into())
}

#[test]
fn uris_name_servers_and_exports() {
    let cases = [
        ("nbd://h", tcp_at("h", PORT), ""),
        ("nbd://h/", tcp_at("h", PORT), ""),
        ("nbd://h//disk", tcp_at("h", PORT), "/disk"),
        ("nbd://h/.", tcp_at("h", PORT), "."),
        ("nbd://h/a/../b", tcp_at("h", PORT), "a/../b"),
        ("nbd://h/a+b", tcp_at("h", PORT), "a+b"),
        ("nbd://h:/x", tcp_at("h", PORT), "x"),
        ("nbd://h:77/%2e", tcp_at("h", 77), "."),
        ("NBD://H/X", tcp_at("H", PORT), "X"),
        ("nbd+tcp://h:1", tcp_at("h", 1), ""),
        ("nbd://", tcp_at("localhost", PORT), ""),
        ("nbd://[::1]:10809/a%20b", tcp_at("::1", PORT), "a b"),
        ("nbd://[fe80::1%25eth0]/", tcp_at("fe80::1%eth0", PORT), ""),
        ("nbd://h/?x-mine=1&x-", tcp_at("h", PORT), ""),
        ("nbd+unix:///vda?socket=/run/x.sock", unix_at("/run/x.sock"), "vda"),
        ("nbd+unix://?socket=s", unix_at("s"), ""),
        ("nbd+unix://host/?socket=s", unix_at("s"), ""),
        ("nbd+unix:///?socket=%00abstract", unix_at("\0abstract"), ""),
        ("nbd+unix:///%3F?socket=/a%26b", unix_at("/a&b"), "?"),
        ("nbd+unix:////odd%20name%3F%26%23%25%C3%BC?socket=/s", unix_at("/s"), "/odd name?&#%ü"),
        ("nbd+vsock://", Address::Vsock { cid: 2, port: 10_809 }, ""),
        ("nbd+vsock://1:5/x", Address::Vsock { cid: 1, port: 5 }, "x"),
    ];
    for (text, address, export) in cases {
        let uri = Uri::parse(text).unwrap();
        assert_eq!((uri.address, uri.export.as_str()), (address, export), "{text}");
        assert!(!uri.tls && uri.user.is_none(), "{text}");
        assert!(Uri::is_like(text), "{text}");
    }
}

#[test]
fn options_of_tls_are_kept() {
    let uri = Uri::parse(
        "nbds+unix://alice@/?socket=s&tls-certificates=/c%20d&tls-hostname=h&tls-verify-peer=0\
         &tls-type=x509",
    )
    .unwrap();
    assert!(uri.tls);
    assert_eq!(uri.user.as_deref(), Some("alice"));
    let expected = TlsOptions {
        kind: Some(TlsKind::X509),
        certificates: Some("/c d".into()),
        hostname: Some("h".to_owned()),
        verify_peer: false,
        psk_file: None,
    };
    assert_eq!(uri.tls_options, expected);
    let named = Uri::parse("nbds://h/?tls-username=bob").unwrap();
    assert_eq!(named.user.as_deref(), Some("bob"));
    for (text, part) in [
        ("nbds://h/?tls-psk-file=/k", "pre-shared key"),
        ("nbds://h/?tls-type=psk", "pre-shared key"),
        ("nbds://h/?tls-type=anon", "anonymous"),
    ] {
        let error = Uri::parse(text).unwrap().client_tls().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.message().contains(part), "{error}");
    }
    assert!(Uri::parse("nbd://h").unwrap().client_tls().unwrap().is_none());
}

#[test]
fn what_is_no_uri_is_refused_with_its_reason() {
    let long = format!("nbd://h/{}", "a".repeat(4097));
    let cases = [
        ("nbd:unix:/s", "does not begin with"),
        ("http://h/", "does not begin with"),
        ("nbd+smoke://h/", "does not begin with"),
        ("nbd://h:99999/", "port \"99999\""),
        ("nbd://h:0/", "port \"0\""),
        ("nbd://h:+1/", "port \"+1\""),
        ("nbd://::1/", "port \":1\""),
        ("nbd://[::1/", "not closed"),
        ("nbd://[::1]x/", "between host and port"),
        ("nbd://[h]/", "no IPv6 address"),
        ("nbd://-oProxyCommand/", "the host \"-o"),
        ("nbd://a%2Fb/", "the host"),
        ("nbd://a:b@h/", "before its @"),
        ("nbd://h/%zz", "broken % in its export name"),
        ("nbd://h/%4", "broken %"),
        ("nbd://h/%+4", "broken %"),
        ("nbd://h/a%00b", "a zero in it"),
        ("nbd://h/%ff", "no UTF-8"),
        ("nbd://h/a b", "character ' '"),
        ("nbd://h/a#b", "fragment"),
        ("nbd://h/?socket=/s", "option \"socket\""),
        ("nbd://h/?sokcet=/s", "option \"sokcet\""),
        ("nbd+unix:///x", "no socket=PATH"),
        ("nbd+unix:///x?socket=", "no path"),
        ("nbd+unix:///x?socket=a%00b", "no path"),
        ("nbd+unix:///x?socket=a&socket=b", "socket twice"),
        ("nbd://h/?tls-hostname=h", "without encryption"),
        ("nbds://h/?tls-verify-peer=maybe", "expected 0 or 1"),
        ("nbds://h/?tls-type=rot13", "expected x509"),
        ("nbds://a@h/?tls-username=b", "user twice"),
        ("nbds://h/?tls-hostname=", "empty"),
        ("nbd+vsock://x/", "context id \"x\""),
        ("nbd+vsock://1:99999999999/", "port"),
        (long.as_str(), "more than 4096"),
    ];
    for (text, part) in cases {
        let error = Uri::parse(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{text}");
        assert!(error.message().contains(part), "{text}: {error}");
    }
    let error = Uri::parse("nbd+ssh://h/x?socket=/s").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn uris_are_printed_as_others_read_them() {
    let cases = [
        (Uri::new(tcp_at("h", 1), ""), "nbd://h:1/"),
        (Uri::new(tcp_at("::1", PORT), "/a b"), "nbd://[::1]:10809//a%20b"),
        (Uri::new(unix_at("/s p"), ""), "nbd+unix:///?socket=/s%20p"),
        (Uri::new(unix_at("s"), "ü?&#%"), "nbd+unix:///%C3%BC%3F%26%23%25?socket=s"),
        (Uri { tls: true, ..Uri::new(tcp_at("h", 1), "x") }, "nbds://h:1/x"),
    ];
    for (uri, text) in cases {
        assert_eq!(uri.to_string(), text);
    }
}

fn any_address() -> impl Strategy<Value = Address> {
    let host = prop_oneof!["[a-zA-Z0-9.]{1,20}", Just("fe80::1%eth0".to_owned())];
    prop_oneof![
        (host, 1..=u16::MAX).prop_map(|(host, port)| Address::Tcp { host, port }),
        proptest::collection::vec(1_u8.., 1..40)
            .prop_map(|bytes| Address::Unix(PathBuf::from(std::ffi::OsString::from_vec(bytes)))),
        (any::<u32>(), any::<u32>()).prop_map(|(cid, port)| Address::Vsock { cid, port }),
    ]
}

fn any_tls() -> impl Strategy<Value = TlsOptions> {
    let kind = prop_oneof![
        Just(None),
        Just(Some(TlsKind::X509)),
        Just(Some(TlsKind::Psk)),
        Just(Some(TlsKind::Anonymous))
    ];
    let file = || proptest::option::of("[^\0]{1,20}".prop_map(PathBuf::from));
    (kind, file(), proptest::option::of("[^\0]{1,20}"), any::<bool>(), file()).prop_map(
        |(kind, certificates, hostname, verify_peer, psk_file)| TlsOptions {
            kind,
            certificates,
            hostname,
            verify_peer,
            psk_file,
        },
    )
}

proptest! {
    #[test]
    fn what_is_printed_is_read_again(
        address in any_address(),
        export in "[^\0]{0,40}",
        user in proptest::option::of("[^\0@:]{1,10}"),
        tls in proptest::option::of(any_tls()),
    ) {
        let uri = Uri {
            address,
            export,
            tls: tls.is_some(),
            user,
            tls_options: tls.unwrap_or_default(),
        };
        prop_assert_eq!(Uri::parse(&uri.to_string()).unwrap(), uri);
    }

    #[test]
    fn no_text_makes_it_panic(text in "(nbds?(\\+(unix|vsock|tcp))?://)?[%\\[\\]:@/?&=a-f0-9#ü-]{0,60}") {
        let _ = Uri::parse(&text);
    }
}
