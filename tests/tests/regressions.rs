// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the fuzzer has found once: replayed, so that it stays mended.

use std::path::Path;
use tranship_tests::fuzz::{Limited, TARGETS};

#[global_allocator]
static MEMORY: Limited = Limited;

#[test]
fn findings_of_the_fuzzer_stay_mended() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions");
    let mut replayed = 0;
    for target in TARGETS {
        let Ok(files) = folder.join(target.name).read_dir() else { continue };
        for file in files {
            let path = file.expect("the folder can be listed").path();
            let input = std::fs::read(&path).expect("the finding can be read");
            // Whoever sees it fail has to know which one it was.
            eprintln!("{}", path.display());
            (target.run)(&input);
            replayed += 1;
        }
    }
    assert!(replayed > 0, "no finding lies in {}", folder.display());
}

#[test]
fn every_target_has_a_program() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
    for target in TARGETS {
        let path = folder.join(format!("{}.rs", target.name));
        let text = std::fs::read_to_string(&path).expect("a target has a file of its name");
        assert!(text.contains(&format!("run(\"{}\", input)", target.name)), "{text}");
    }
    let programs = folder.read_dir().expect("the folder can be listed").count();
    assert_eq!(programs, TARGETS.len());
}

#[test]
fn every_target_stands_nothing_at_all() {
    for target in TARGETS {
        for input in [&[][..], &[0], &[0xff; 100], &[0x41; 2000]] {
            (target.run)(input);
        }
    }
}
