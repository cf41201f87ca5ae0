// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `appliance export` and `import`: for machines that cannot download a kernel package.

use super::telling;
use crate::args::{ExportArgs, ImportArgs};
use crate::failure::Failure;
use crate::{logging, places, stdout};
use indicatif::HumanBytes;

/// Writes the appliance, which is built first if need be, to a new file.
pub(super) fn export(options: &ExportArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let image = tranship_appliance_image::build(&places::build_options(None)?, &telling())?;
    tranship_appliance_image::export(&image, &options.file)?;
    let size = std::fs::metadata(&options.file).map_or(0, |found| found.len());
    stdout::print(&format!(
        "{}: appliance with kernel {}, {}\n",
        options.file.display(),
        image.kernel_release,
        HumanBytes(size)
    ))?;
    Ok(0)
}

/// Takes an exported appliance into the cache.
pub(super) fn import(options: &ImportArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let cache = places::appliance_cache()?;
    let import = tranship_appliance_image::import(&options.file, &cache, &telling())?;
    stdout::print(&format!(
        "kernel {} from {}, {} programs\nin {}; used where no kernel package can be had\n",
        import.kernel_release,
        import.kernel_source,
        import.tools.len(),
        cache.display()
    ))?;
    Ok(0)
}
