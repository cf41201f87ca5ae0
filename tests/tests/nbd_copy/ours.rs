// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What nbdcopy does not have.

use crate::servers::Server;
use crate::support::{digest, host, names};
use crate::{COPY, SIZE, copies, place, run, same};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

#[test]
fn images_go_in_and_come_out() {
    let Some(place) = place() else { return };
    for format in ["qcow2", "vmdk"] {
        let image = format!("image.{format}");
        copies(&place, true, &["-O", format, "disk", &image]);
        let [disk, path] = ["disk", &image].map(|name| place.text(name));
        host("qemu-img", &["compare", "-f", "raw", "-F", format, &disk, &path]);
        copies(&place, true, &["-f", format, &image, "copied"]);
        same(&place.path("disk"), &place.path("copied"), format);
        // Without a format an image is bytes like any others.
        copies(&place, true, &[&image, "bytes"]);
        same(&place.path(&image), &place.path("bytes"), format);
        for name in ["copied", "bytes"] {
            fs::remove_file(place.path(name)).unwrap();
        }
    }
    let words = "qemu-nbd -t -k SOCKET -f raw image.qcow2";
    let server = Server::start(&place, "bytes", words);
    copies(&place, true, &["-f", "qcow2", &server.uri(), "copied"]);
    same(&place.path("disk"), &place.path("copied"), "an image on a server");
    let spec = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"image.qcow2"}}"#;
    drop(server);
    let file = File::options().write(true).open(place.path("disk")).unwrap();
    file.write_all_at(b"changed", 5 << 20).unwrap();
    copies(&place, true, &["disk", spec]);
    copies(&place, true, &[spec, "copied"]);
    same(&place.path("disk"), &place.path("copied"), "an image that was there");
}

#[test]
fn hashes_are_those_of_the_disk_whatever_it_comes_from() {
    let Some(place) = place() else { return };
    let verify = |hash: &str| {
        place.run(&["image", "verify", "-f", "raw", "--hash", hash, "disk"], COPY).ended_with(0);
    };
    copies(&place, true, &["--hash", "file.hash", "disk", "new"]);
    verify("file.hash");
    let server = Server::start(&place, "source", "nbdkit -f -U SOCKET file disk");
    copies(&place, true, &["--hash", "nbd.hash", &server.uri(), "null:"]);
    copies(&place, true, &["--no-extents", "--hash", "all.hash", &server.uri(), "null:"]);
    let shell = "cat disk | \"$0\" --hash pipe.hash - copied; \"$0\" --hash sink.hash disk - >out2";
    let output = std::process::Command::new("bash")
        .args(["-euc", shell])
        .arg(crate::program(&place, true))
        .current_dir(place.path("."))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let wanted = fs::read(place.path("file.hash")).unwrap();
    for name in ["nbd.hash", "all.hash", "pipe.hash", "sink.hash"] {
        assert!(fs::read(place.path(name)).unwrap() == wanted, "{name}");
    }
    assert!(names(&place.path(".")).iter().all(|name| !name.contains(".part")));
}

#[test]
fn what_was_done_is_told_as_json() {
    let Some(place) = place() else { return };
    let server = Server::start(&place, "source", "nbdkit -f -U SOCKET file disk");
    let words = ["-C", "2", "--json", "--statistics", "told", "--hash", "h", &server.uri(), "new"];
    let output = run(&place, true, &words);
    assert!(output.status.success());
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["bytes"], SIZE);
    assert_eq!(
        (&told["source"]["kind"], &told["source"]["connections"]),
        (&"server".into(), &2.into())
    );
    assert_eq!(told["destination"]["kind"], "file");
    let copied = &told["copied"];
    let sum = ["bytes_written", "bytes_zero"].map(|key| copied[key].as_u64().unwrap());
    assert_eq!(sum.iter().sum::<u64>(), SIZE);
    assert!(sum[0] < 5 << 20, "{copied}");
    assert_eq!(told["manifest"]["digest"].as_str().unwrap().len(), 64);
    let statistics: Value = serde_json::from_slice(&fs::read(place.path("told")).unwrap()).unwrap();
    assert_eq!(statistics["disks"][0]["role"], "source");
    assert_eq!(statistics["disks"][0]["reads"]["bytes"], copied["bytes_read"]);
    assert_eq!(statistics["copied"]["bytes_written"], copied["bytes_written"]);
}

#[test]
fn a_server_that_is_zero_already_gets_no_zeroes() {
    let Some(place) = place() else { return };
    File::create(place.path("target")).unwrap().set_len(SIZE).unwrap();
    let words = "nbdkit -f -U SOCKET --filter=log file target logfile=log";
    let server = Server::start(&place, "empty", words);
    copies(&place, true, &["disk", &server.uri()]);
    drop(server);
    same(&place.path("disk"), &place.path("target"), "an empty server");
    let log = fs::read_to_string(place.path("log")).unwrap();
    assert!(log.contains(" Write ") && !log.contains(" Zero "), "{log}");
    assert!(log.contains(" Flush "), "what is written has to be flushed: {log}");
}

#[test]
fn a_rate_is_kept() {
    let Some(place) = place() else { return };
    let begun = std::time::Instant::now();
    copies(&place, true, &["--limit-rate", "4M", "disk", "new"]);
    assert!(begun.elapsed().as_millis() > 500);
    assert_eq!(digest(&place.path("new")), digest(&place.path("disk")));
}
