// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `appliance build`: makes the appliance, or brings it up to date.

use super::telling;
use crate::args::BuildArgs;
use crate::failure::Failure;
use crate::{logging, places, stdout};
use indicatif::HumanBytes;
use serde_json::json;
use std::fmt::Write;
use std::path::Path;
use std::time::Instant;
use tranship_appliance_image::{BuildOptions, KernelSource};

/// Runs the command.
pub(super) fn run(options: &BuildArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let kernel = options.kernel.clone().zip(options.modules.clone());
    let kernel = kernel.map(|(kernel, modules)| KernelSource { kernel, modules });
    let what = BuildOptions { refresh: options.refresh, ..places::build_options(kernel)? };
    let begun = Instant::now();
    let image = tranship_appliance_image::build(&what, &telling())?;
    let elapsed = begun.elapsed();
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |found| found.len());
    let files = [
        ("kernel", image.kernel.as_path()),
        ("initramfs", image.initramfs.as_path()),
        ("tools", image.tools.as_path()),
    ];
    let manifest = &image.manifest;
    let absent: Vec<_> = manifest.tools.iter().filter(|tool| !tool.present).collect();
    if options.json {
        let files: Vec<_> = files
            .iter()
            .map(|(name, path)| json!({"name": name, "path": path, "size": size(path)}))
            .collect();
        stdout::json(&json!({
            "kernel_release": image.kernel_release,
            "kernel_source": manifest.kernel_source,
            "key": image.key,
            "files": files,
            "tools_absent": absent,
            "elapsed_ms": elapsed.as_secs_f64() * 1e3,
        }))?;
        return Ok(0);
    }
    let mut text = format!("{} from {}\n", image.kernel_release, manifest.kernel_source);
    for (name, path) in files {
        let size = HumanBytes(size(path)).to_string();
        let _ = writeln!(text, "{name:>10} {size:>12}  {}", path.display());
    }
    for tool in absent {
        let why = tool.problem.as_deref().unwrap_or("not installed");
        let _ = writeln!(text, "without {} (package {}): {why}", tool.name, tool.package);
    }
    let _ = writeln!(text, "ready after {:.3} s", elapsed.as_secs_f64());
    stdout::print(&text)?;
    Ok(0)
}
