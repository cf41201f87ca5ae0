// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What block status tells of images that were written at random, beside the real qemu-nbd.

use crate::bench::{Bench, Who};
use crate::support::{SHORT, host};
use rustix::process::Signal;

const SIZE: u64 = 16 << 20;

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % limit
    }

    /// A few changes of an image in qemu-io's words.
    fn changes(&mut self, count: u64) -> Vec<String> {
        (0..count)
            .map(|_| {
                let unit = [512, 4096, 65_536][usize::try_from(self.below(3)).unwrap()];
                let len = (self.below((1 << 20) / unit) + 1) * unit;
                let at = self.below((SIZE - len) / unit) * unit;
                let what = match self.below(6) {
                    0 => "write -z",
                    1 => "write -z -u",
                    2 => "discard",
                    _ => "write -P 0x5a",
                };
                format!("{what} {at} {len}")
            })
            .collect()
    }
}

fn change(path: &str, format: &str, random: &mut Random) {
    let changes = random.changes(8);
    let mut words = vec!["-d", "unmap", "-f", format];
    words.extend(changes.iter().flat_map(|change| ["-c", change.as_str()]));
    words.push(path);
    host("qemu-io", &words);
}

#[test]
fn maps_of_random_images_are_those_of_qemu_nbd() {
    let Some(bench) = Bench::new() else { return };
    let size = SIZE.to_string();
    for seed in 0..12_u64 {
        let mut random = Random(seed);
        let [base, top] = ["base", "top"].map(|name| bench.text(&format!("{name}{seed}")));
        let chain = [&["raw"][..], &["qcow2"], &["qcow2", "raw"], &["qcow2", "qcow2"]];
        let chain = chain[usize::try_from(seed % 4).unwrap()];
        // A base may be shorter than what is based on it.
        let is_short = seed % 8 >= 4;
        if let Some(format) = chain.get(1) {
            let size = if is_short { SIZE - (3 << 20) } else { SIZE };
            host("qemu-img", &["create", "-q", "-f", format, &base, &SIZE.to_string()]);
            change(&base, format, &mut random);
            host("qemu-img", &["resize", "-q", "--shrink", "-f", format, &base, &size.to_string()]);
            let words = [
                "create",
                "-q",
                "-f",
                chain[0],
                "-b",
                &format!("base{seed}"),
                "-F",
                format,
                &top,
                &size.to_string(),
            ];
            host("qemu-img", &words);
            host("qemu-img", &["resize", "-q", "-f", chain[0], &top, &SIZE.to_string()]);
        } else {
            host("qemu-img", &["create", "-q", "-f", chain[0], &top, &size]);
        }
        change(&top, chain[0], &mut random);
        let mut contexts = vec!["base:allocation"];
        if !is_short {
            // Of what is behind the end of a base, QEMU says that the base has it.
            contexts.push("qemu:allocation-depth");
        }
        let mut words = format!("-t -r -A -f {} @top{seed}", chain[0]);
        if chain[0] == "qcow2" {
            host("qemu-img", &["bitmap", "--add", "-g", "32k", &top, "b"]);
            change(&top, chain[0], &mut random);
            contexts.push("qemu:dirty-bitmap:b");
            words.push_str(" -B b");
        }
        let told = [Who::Real, Who::Link].map(|who| {
            let server = bench.start(who, &words);
            let maps: Vec<String> = contexts
                .iter()
                .map(|context| host("nbdinfo", &[&format!("--map={context}"), &bench.uri("")]))
                .collect();
            server.signal(Signal::TERM);
            server.wait(SHORT).ended_with(0);
            maps
        });
        for ((context, theirs), ours) in contexts.iter().zip(&told[0]).zip(&told[1]) {
            assert_eq!(ours, theirs, "{context} of {chain:?}, seed {seed}");
        }
    }
}
