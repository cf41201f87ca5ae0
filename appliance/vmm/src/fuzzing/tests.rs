// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use proptest::prelude::*;

fn run(name: &str, input: &[u8]) {
    match name {
        "vmm_disk" => disk_requests(input),
        "vmm_console" => console_ports(input),
        _ => board(input),
    }
}

#[test]
fn the_seeds_do_what_they_are_for() {
    for (name, input) in seeds() {
        run(name, &input);
    }
    // The read of the first seed gets as far as its buffer.
    let (_, input) = &seeds()[0];
    let (ram, _) = memory(&input[1..]);
    let mut function = function(disk(false), 0, &ram);
    start(&mut function, 1, input[0]);
    let used = || ram.read_obj::<u16>(GuestAddress(rings(0, 0)[2] + 2)).unwrap();
    let begun = std::time::Instant::now();
    while used() < 5 {
        assert!(begun.elapsed().as_secs() < 20, "only {} requests were served", used());
        std::thread::yield_now();
    }
    function.reset();
    assert_eq!(ram.read_obj::<[u8; 5]>(GuestAddress(0x6200)).unwrap(), [0; 5]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn a_driver_that_changes_a_few_bytes_does_no_harm(
        seed in 0..seeds().len(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        more in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        let (name, mut input) = seeds().swap_remove(seed);
        for (at, value) in changes {
            let at = at.index(input.len());
            input[at] = value;
        }
        input.extend(more);
        run(name, &input);
    }
}

/// `PROPTEST_CASES` asks for more.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(300)
}
