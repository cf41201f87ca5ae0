// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Builds an appliance by hand, to measure and to try it in an emulator:
//! `appliance CACHE AGENT [KERNEL MODULES]`, `appliance CACHE AGENT export FILE`,
//! `appliance CACHE AGENT import FILE`, `appliance CACHE AGENT refresh`.

use std::path::PathBuf;
use std::time::Instant;

use tranship_appliance_image::{AgentSource, BuildOptions, KernelSource, build, export, import};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [cache, agent, rest @ ..] = words.as_slice() else {
        eprintln!(
            "usage: appliance CACHE AGENT [KERNEL MODULES | export FILE | import FILE | refresh]"
        );
        std::process::exit(2);
    };
    let kernel = match rest {
        ["export" | "import", _] => None,
        [kernel, modules] => {
            Some(KernelSource { kernel: PathBuf::from(kernel), modules: PathBuf::from(modules) })
        }
        _ => None,
    };
    let options = BuildOptions {
        cache_dir: PathBuf::from(cache),
        agent: AgentSource { path: PathBuf::from(agent) },
        kernel,
        imported: matches!(rest, ["import", _]),
        refresh: rest == ["refresh"],
    };
    let start = Instant::now();
    let progress = |event| eprintln!("{:8.3} s  {event:?}", start.elapsed().as_secs_f64());
    let run = || {
        if let ["import", file] = rest {
            eprintln!("{:?}", import(file.as_ref(), &options.cache_dir, &progress)?);
        }
        let appliance = build(&options, &progress)?;
        eprintln!("{:8.4} s  done", start.elapsed().as_secs_f64());
        if let ["export", file] = rest {
            export(&appliance, file.as_ref())?;
            eprintln!("{:8.3} s  exported", start.elapsed().as_secs_f64());
        }
        Ok(appliance)
    };
    let appliance = match run() {
        Ok(appliance) => appliance,
        Err(error) => {
            let error: tranship_appliance_image::Error = error;
            eprintln!("error: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(next) = cause {
                eprintln!("  because: {next}");
                cause = next.source();
            }
            if let Some(remedy) = error.what_helps() {
                eprintln!("  remedy: {remedy}");
            }
            std::process::exit(1);
        }
    };
    for path in [&appliance.kernel, &appliance.initramfs, &appliance.tools] {
        let size = std::fs::metadata(path).map_or(0, |meta| meta.len());
        println!("{size:>10} {}", path.display());
    }
    let manifest = &appliance.manifest;
    println!("kernel {} from {}", appliance.kernel_release, manifest.kernel_source);
    println!("initramfs modules: {}", manifest.transport.join(" "));
    println!("{} modules", manifest.modules.modules.len());
    println!("built in: {}", manifest.modules.built_in.join(" "));
    println!("missing modules: {}", manifest.modules.missing.join(" "));
    println!("broken modules: {:?}", manifest.modules.broken);
    for tool in manifest.tools.iter().filter(|tool| !tool.present) {
        println!("no {} ({}): {:?}", tool.name, tool.package, tool.problem);
    }
}
