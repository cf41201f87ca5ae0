// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use tranship_block::ErrorKind;

fn file(path: &str) -> Place {
    Place::File(path.into())
}

fn unix(path: &str, export: &str) -> Place {
    Place::Nbd(Box::new(NbdAddress::new(Uri::new(Address::Unix(path.into()), export))))
}

fn tcp(host: &str, port: u16, export: &str) -> Place {
    let address = Address::Tcp { host: host.into(), port };
    Place::Nbd(Box::new(NbdAddress::new(Uri::new(address, export))))
}

#[test]
fn names_are_paths_or_protocols() {
    let cases = [
        ("disk.img", file("disk.img")),
        ("./a:b", file("./a:b")),
        ("/a:b", file("/a:b")),
        ("file:a", file("a")),
        (":a", file(":a")),
        ("nbd:unix:/run/s", unix("/run/s", "")),
        ("nbd:unix:/run/s:exportname=x y", unix("/run/s", "x y")),
        ("nbd:localhost:10809", tcp("localhost", 10_809, "")),
        ("nbd:[::1]:1:exportname=a", tcp("::1", 1, "a")),
        ("nbd://host", tcp("host", 10_809, "")),
        ("nbd://host:77/a/b", tcp("host", 77, "a/b")),
        ("nbd://[::1]/x", tcp("::1", 10_809, "x")),
        ("nbd+unix:///ex%20p?socket=/run/a%2fb", unix("/run/a/b", "ex p")),
        ("nbd+unix://?socket=s", unix("s", "")),
        ("nbd+unix://a:b/?socket=s", unix("s", "")),
        ("nbd://", tcp("localhost", 10_809, "")),
    ];
    for (name, place) in cases {
        let spec = Spec::from_name(name).unwrap();
        assert_eq!((spec.name.as_str(), spec.place), (name, place));
        assert_eq!(spec.format, None);
    }
    let Place::Nbd(address) = Spec::from_name("nbds://h/?tls-hostname=x").unwrap().place else {
        panic!("not an NBD address")
    };
    assert!(address.uri.tls);
    assert_eq!(address.uri.tls_options.hostname.as_deref(), Some("x"));
}

#[test]
fn options_of_nbd_are_those_of_qemu() {
    let place = |options: &str| match Spec::from_options(options).map(|spec| spec.place) {
        Ok(Place::Nbd(address)) => Ok(*address),
        Ok(other) => panic!("{options}: {other:?}"),
        Err(error) => Err(error.to_string()),
    };
    let address = place(
        "driver=nbd,server.type=inet,server.host=h,server.port=7,export=e,tls-creds=tls0,\
         tls-hostname=x,reconnect-delay=20",
    )
    .unwrap();
    assert_eq!(address.uri.address, Address::Tcp { host: "h".into(), port: 7 });
    assert_eq!((address.uri.export.as_str(), address.uri.tls), ("e", true));
    assert_eq!(address.credentials.as_deref(), Some("tls0"));
    assert_eq!(address.uri.tls_options.hostname.as_deref(), Some("x"));
    assert_eq!(address.reconnect, Duration::from_secs(20));
    let vsock = place("driver=nbd,server.type=vsock,server.cid=3,server.port=70000").unwrap();
    assert_eq!(vsock.uri.address, Address::Vsock { cid: 3, port: 70_000 });
    for (options, part) in [
        ("driver=nbd", "either 'server.path' or 'server.host'"),
        ("driver=nbd,path=s,host=h", "either"),
        ("driver=nbd,server.type=fd,server.str=3", "expected inet, unix or vsock"),
        ("driver=nbd,path=s,tls-hostname=h", "with 'tls-creds' only"),
        ("driver=nbd,host=h,port=0", "port is \"0\""),
    ] {
        let error = place(options).unwrap_err();
        assert!(error.contains(part), "{options}: {error}");
    }
}

#[test]
fn nbd_addresses_are_shown_as_qemu_shows_them() {
    for (name, shown) in [
        ("nbd:unix:/tmp/s:exportname=x", "nbd+unix:///x?socket=/tmp/s"),
        ("nbd:unix:/tmp/s", "nbd+unix://?socket=/tmp/s"),
        ("nbd://localhost", "nbd://localhost:10809"),
        ("nbds://h/a", "nbds://h:10809/a"),
    ] {
        let Place::Nbd(address) = Spec::from_name(name).unwrap().place else { panic!("{name}") };
        assert_eq!(address.shown(), shown);
    }
}

#[test]
fn both_syntaxes_of_options_mean_the_same() {
    let pairs = [
        (
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a,b"}}"#,
            "driver=qcow2,file.driver=file,file.filename=a,,b",
        ),
        (
            r#"json:{"driver":"raw","offset":512,"size":1024,"file":{"driver":"file","filename":"a"}}"#,
            "driver=raw,offset=512,size=1024,file.driver=file,file.filename=a",
        ),
        (
            r#"json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"unix","path":"s"},"export":"e"}}"#,
            "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=s,file.export=e",
        ),
        (r#"json:{"file.filename":"a"}"#, "file.filename=a"),
    ];
    for (json, options) in pairs {
        let a = Spec::from_name(json).unwrap();
        let b = Spec::from_options(options).unwrap();
        assert_eq!(Spec { name: String::new(), ..a }, Spec { name: String::new(), ..b }, "{json}");
    }
    let slice = Spec::from_options(pairs[1].1).unwrap();
    assert_eq!(slice.slice, Some(SliceOf { offset: 512, size: Some(1024) }));
    assert_eq!(slice.format, Some(Format::Raw));
    let above = r#"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"a"}}"#;
    assert_eq!(Spec::from_name(above).unwrap().backing, Below::Nothing);
    let given = "driver=qcow2,file.filename=a,backing.driver=raw,backing.file.filename=b";
    let Below::Given(base) = Spec::from_options(given).unwrap().backing else { panic!("no base") };
    assert_eq!((base.place, base.format), (file("b"), Some(Format::Raw)));
}

#[test]
fn nonsense_is_refused_by_name() {
    let cases = [
        ("http://x/y", ErrorKind::Unsupported, "unknown protocol 'http'"),
        ("json:[]", ErrorKind::Usage, "no object"),
        ("json:{", ErrorKind::Usage, "could not parse"),
        (r#"json:{"driver":"qcow2"}"#, ErrorKind::Usage, "needs option 'file'"),
        (r#"json:{"driver":"file"}"#, ErrorKind::Usage, "needs option 'filename'"),
        (
            r#"json:{"driver":"file","filename":"a","colour":1}"#,
            ErrorKind::Usage,
            "does not support the option 'colour'",
        ),
        ("nbd:host", ErrorKind::Usage, "has no port"),
        ("nbd:host:99999", ErrorKind::Usage, "port is \"99999\""),
        ("nbd+unix:///x", ErrorKind::Usage, "has no socket"),
        ("nbds:h:1", ErrorKind::Unsupported, "unknown protocol"),
        ("nbd://h/%zz", ErrorKind::Usage, "broken %"),
    ];
    for (name, kind, text) in cases {
        let error = Spec::from_name(name).unwrap_err();
        assert_eq!(error.kind(), kind, "{name}: {error}");
        assert!(error.message().contains(text), "{name}: {error}");
    }
    let deep = format!("json:{}1{}", r#"{"a":"#.repeat(100), "}".repeat(100));
    assert!(Spec::from_name(&deep).unwrap_err().message().contains("too deeply"));
    assert!(Spec::from_options("a").unwrap_err().message().contains("expected '='"));
}
