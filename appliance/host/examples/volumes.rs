// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Starts the appliance on raw disks and prints what is on them: the guest API in one page.
//!
//! `cargo run --release -p tranship-appliance --example volumes -- CACHE-FOLDER DISK…`

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tranship_appliance::{Boot, Drive, Guest, Settings};
use tranship_appliance_image::{AgentSource, BuildOptions, build};
use tranship_raw::{Access, RawFile};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if tranship_agent::is_appliance() {
        tranship_agent::run()
    }
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let mut arguments = std::env::args_os().skip(1);
    let cache = arguments.next().ok_or("which folder keeps the appliance?")?;
    let begun = Instant::now();
    let options = BuildOptions {
        cache_dir: cache.into(),
        agent: AgentSource { path: std::env::current_exe()? },
        kernel: None,
        imported: false,
        refresh: false,
    };
    let image = build(&options, &|event| println!("{event:?}"))?;
    println!("appliance {} after {:?}", image.kernel_release, begun.elapsed());
    let boot = Boot { kernel: image.kernel, initramfs: image.initramfs, tools: image.tools };
    let mut guest = Guest::new(Settings::default());
    for path in arguments {
        let device = Arc::new(RawFile::open(Path::new(&path), Access::ReadOnly)?);
        guest.add_drive(Drive { device, read_only: true, durable: false, image: None })?;
    }
    guest.launch(&boot)?;
    println!("{:#?} after {:?}", guest.launch_report()?, begun.elapsed());
    for volume in guest.volumes()? {
        println!("{} {:?} {:?}", volume.device, volume.kind, volume.tags);
    }
    println!("listed after {:?}", begun.elapsed());
    guest.shutdown()?;
    println!("down after {:?}", begun.elapsed());
    Ok(())
}
