// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Crates may depend on what lies below them and on nothing above.
//!
//! The layers are the top-level folders, from the lowest: `formats`, `appliance`, `inspect`,
//! `convert`, `cli`. Inside `formats` there are three more: `block`, then the formats, then
//! `registry`, which knows them all. The `tests` crate stands outside and may use everything.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The top-level folders from the lowest layer to the highest.
const ROOMS: [&str; 5] = ["formats", "appliance", "inspect", "convert", "cli"];

/// A crate of the workspace, by its folder relative to the workspace's root.
struct Member {
    name: String,
    folder: String,
    /// Folders of the workspace's crates it depends on in any way: to run, to build, to test.
    needs: Vec<String>,
}

/// Where a folder stands: its room, and inside `formats` its floor.
///
/// `None` for a folder that is in no room: a crate there has no place in the order.
fn layer(folder: &str) -> Option<(usize, usize)> {
    let (room, rest) = folder.split_once('/').unwrap_or((folder, ""));
    let room_index = ROOMS.iter().position(|known| *known == room)?;
    let floor = match (room, rest) {
        ("formats", "block") => 0,
        ("formats", "registry") => 2,
        ("formats", _) => 1,
        _ => 0,
    };
    Some((room_index, floor))
}

/// Every edge that points upward, and every crate outside the order, as a sentence.
///
/// Edges between crates of one layer are allowed: cargo itself refuses cycles.
fn violations(members: &[Member]) -> Vec<String> {
    let mut found = Vec::new();
    for member in members.iter().filter(|member| member.folder != "tests") {
        let Some(own) = layer(&member.folder) else {
            found.push(format!("{} lies in {}, which is no layer", member.name, member.folder));
            continue;
        };
        for need in &member.needs {
            match layer(need) {
                Some(other) if other <= own => {}
                _ => found.push(format!(
                    "{} in {} depends on {need}, which is not below it",
                    member.name, member.folder
                )),
            }
        }
    }
    found
}

/// Reads the members and their edges out of what `cargo metadata` prints.
fn members(metadata: &Value) -> Vec<Member> {
    let root = Path::new(metadata["workspace_root"].as_str().expect("workspace_root is a string"));
    let folder_of =
        |path: &Path| path.strip_prefix(root).ok().map(|path| path.to_string_lossy().into_owned());
    let packages = metadata["packages"].as_array().expect("packages is a list");
    packages
        .iter()
        .map(|package| {
            let manifest = Path::new(package["manifest_path"].as_str().expect("a manifest path"));
            let dependencies = package["dependencies"].as_array().expect("a dependency list");
            Member {
                name: package["name"].as_str().expect("a package name").to_owned(),
                folder: folder_of(manifest.parent().expect("a manifest lies in a folder"))
                    .expect("members lie below the root"),
                // Only path dependencies have a path; the rest comes from a registry.
                needs: dependencies
                    .iter()
                    .filter_map(|dependency| dependency["path"].as_str())
                    .filter_map(|path| folder_of(Path::new(path)))
                    .collect(),
            }
        })
        .collect()
}

/// What cargo knows about this workspace, without asking any registry.
fn cargo_metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo prints JSON")
}

#[test]
fn dependencies_point_downward() {
    let members = members(&cargo_metadata());
    // A reader that finds nothing would pass; the workspace has edges that must be seen.
    let edges: BTreeMap<_, _> =
        members.iter().map(|member| (member.folder.as_str(), member.needs.as_slice())).collect();
    assert!(edges["formats/raw"].iter().any(|need| need == "formats/block"), "{edges:?}");
    assert!(edges.contains_key("cli"), "{edges:?}");

    let found = violations(&members);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn upward_edges_are_reported() {
    let cases: [(&str, &str, bool); 13] = [
        // folder, what it needs, allowed
        ("cli", "convert/engine", true),
        ("convert/engine", "formats/registry", true),
        ("convert/linux", "convert/source", true),
        ("formats/registry", "formats/qcow2", true),
        ("formats/qcow2", "formats/block", true),
        ("tests", "cli", true),
        ("formats/block", "formats/raw", false),
        ("formats/qcow2", "formats/registry", false),
        ("formats/nbd", "appliance/protocol", false),
        ("appliance/host", "inspect/os", false),
        ("inspect/os", "convert/engine", false),
        ("convert/engine", "cli", false),
        ("cli", "tests", false),
    ];
    for (folder, need, allowed) in cases {
        let member = Member {
            name: "probe".to_owned(),
            folder: folder.to_owned(),
            needs: vec![need.to_owned()],
        };
        let found = violations(&[member]);
        assert_eq!(found.is_empty(), allowed, "{folder} -> {need}: {found:?}");
        if !allowed {
            assert_eq!(
                found,
                [format!("probe in {folder} depends on {need}, which is not below it")]
            );
        }
    }
}

#[test]
fn edges_are_read_from_every_kind_of_dependency() {
    let metadata = serde_json::json!({
        "workspace_root": "/w",
        "packages": [{
            "name": "tranship-block",
            "manifest_path": "/w/formats/block/Cargo.toml",
            "dependencies": [
                { "name": "libc", "kind": null },
                { "name": "tranship-raw", "kind": "dev", "path": "/w/formats/raw" },
                { "name": "tranship", "kind": "build", "path": "/w/cli" },
            ],
        }],
    });
    assert_eq!(
        violations(&members(&metadata)),
        [
            "tranship-block in formats/block depends on formats/raw, which is not below it",
            "tranship-block in formats/block depends on cli, which is not below it",
        ]
    );
}

#[test]
fn a_crate_outside_the_layers_is_reported() {
    let member =
        Member { name: "stray".to_owned(), folder: "helpers/x".to_owned(), needs: Vec::new() };
    assert_eq!(violations(&[member]), ["stray lies in helpers/x, which is no layer"]);
}
