// SPDX-License-Identifier: Apache-2.0 OR MIT
#![no_main]

#[global_allocator]
static MEMORY: tranship_tests::fuzz::Limited = tranship_tests::fuzz::Limited;

libfuzzer_sys::fuzz_target!(|input: &[u8]| tranship_tests::fuzz::run("vmm_disk", input));
