// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use tranship_block::ErrorKind;

fn file(path: &str) -> Place {
    Place::File(path.into())
}

fn unix(path: &str, export: &str) -> Place {
    let server = NbdServer::Unix(path.into());
    Place::Nbd(NbdAddress { server, export: export.into(), tls: false })
}

fn tcp(host: &str, port: u16, export: &str) -> Place {
    let server = NbdServer::Tcp { host: host.into(), port };
    Place::Nbd(NbdAddress { server, export: export.into(), tls: false })
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
    ];
    for (name, place) in cases {
        let spec = Spec::from_name(name).unwrap();
        assert_eq!((spec.name.as_str(), spec.place), (name, place));
        assert_eq!(spec.format, None);
    }
    assert!(matches!(
        Spec::from_name("nbds://h/").unwrap().place,
        Place::Nbd(NbdAddress { tls: true, .. })
    ));
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
