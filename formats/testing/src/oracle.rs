// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The reference tools.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Whether a reference tool is installed; says so where the test's output shows if not.
pub fn has_tool(name: &str) -> bool {
    let found = Command::new(name).arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: {name} is not installed");
    }
    found
}

/// Runs qemu-img, which has to succeed, and returns its standard output.
pub fn qemu_img(args: &[&str], paths: &[&Path]) -> String {
    let output = qemu_img_status(args, paths);
    assert!(
        output.status.success(),
        "qemu-img {args:?} {paths:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs qemu-img, whatever comes of it.
pub fn qemu_img_status(args: &[&str], paths: &[&Path]) -> Output {
    Command::new("qemu-img").args(args).args(paths).output().unwrap()
}

/// The guest's bytes as qemu-img sees them in an image of `format`.
pub fn raw_by_qemu(format: &str, folder: &Path, image: &Path) -> Vec<u8> {
    let raw: PathBuf = folder.join("by-qemu.raw");
    qemu_img(&["convert", "-f", format, "-O", "raw"], &[image, &raw]);
    std::fs::read(raw).unwrap()
}
