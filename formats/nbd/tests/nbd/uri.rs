// SPDX-License-Identifier: Apache-2.0 OR MIT
//! URIs that we print, read by others.

use crate::client::{export, sample, serve};
use std::process::Command;
use tranship_nbd::{Address, Limits, Uri};

#[test]
fn nbdinfo_reads_what_we_print() {
    for name in ["", "vda", "/odd name?&#%ü", ".", "a//b", "a+b", "x=y;z"] {
        let place = serve(vec![export(name, sample())], Limits::default());
        let socket = place.folder.path().join("a b&c%d");
        std::os::unix::fs::symlink(place.socket(), &socket).unwrap();
        let uri = Uri::new(Address::Unix(socket), name);
        let output = match Command::new("nbdinfo").arg("--size").arg(uri.to_string()).output() {
            Ok(output) => output,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: nbdinfo is not installed");
                return;
            }
            Err(error) => panic!("nbdinfo: {error}"),
        };
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{uri}: {errors}");
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "1048576", "{uri}");
    }
}
