// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvm-probe [-v]`: prints whether KVM is usable here, and exits with 1 if it is not.

use std::process::ExitCode;

fn main() -> ExitCode {
    let verbose = std::env::args().any(|argument| argument == "-v");
    let verdict = tranship_kvm::probe(tranship_kvm::DEFAULT_LIMIT);
    if verbose {
        for (step, took) in &verdict.steps {
            println!("  {step:<28} {:>10.1} µs", took.as_secs_f64() * 1e6);
        }
    }
    let word = if verdict.usable { "usable" } else { "unusable" };
    println!("{word}: {} ({:.1} ms)", verdict.reason, verdict.elapsed.as_secs_f64() * 1e3);
    if verdict.usable {
        return ExitCode::SUCCESS;
    }
    println!("remedy: {}", verdict.remedy);
    ExitCode::FAILURE
}
