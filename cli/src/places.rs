// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where things are kept, and how the appliance is started, as the environment says.

use crate::args::{MachineArgs, WarmStart};
use crate::failure::Failure;
use std::ffi::OsString;
use std::path::PathBuf;
use tranship_appliance::{Boot, Preference, Settings};
use tranship_appliance_image::{AgentSource, Appliance, BuildOptions, Event, KernelSource};
use tranship_convert::ErrorKind;

/// The folder of the appliance: `$TRANSHIP_CACHE`, else the user's cache folder.
pub(crate) fn appliance_cache() -> Result<PathBuf, Failure> {
    cache_folder(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
        .map(|folder| folder.join("appliance"))
        .ok_or_else(|| {
            Failure::new(
                ErrorKind::Usage,
                "no folder for the cache: neither HOME nor XDG_CACHE_HOME is set",
            )
            .hint("name one in the environment variable TRANSHIP_CACHE")
        })
}

fn cache_folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    // The XDG specification has relative paths ignored.
    let xdg = || variable("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || variable("HOME").map(|home| PathBuf::from(home).join(".cache"));
    variable("TRANSHIP_CACHE")
        .map(PathBuf::from)
        .or_else(|| xdg().or_else(home).map(|path| path.join("tranship")))
}

/// What the appliance is made of: this very program is its agent.
pub(crate) fn build_options(kernel: Option<KernelSource>) -> Result<BuildOptions, Failure> {
    let agent = std::env::current_exe()
        .map_err(|error| Failure::io("finding this program's own file", &error))?;
    Ok(BuildOptions {
        cache_dir: appliance_cache()?,
        agent: AgentSource { path: agent },
        kernel,
        imported: false,
        refresh: false,
    })
}

/// How the appliance is started: options, then the environment.
pub(crate) fn settings(machine: &MachineArgs) -> Settings {
    let defaults = Settings::default();
    let old = std::env::var("LIBGUESTFS_BACKEND_SETTINGS").unwrap_or_default();
    Settings {
        backend: machine.backend.or_else(|| from_libguestfs(&old)).unwrap_or_default(),
        monitor: monitor(),
        memory_mib: machine.memsize.unwrap_or(defaults.memory_mib),
        huge_pages: machine.huge_pages,
        processors: machine.smp.unwrap_or(defaults.processors),
        dumps: dumps(),
        snapshots: match machine.warm_start {
            WarmStart::Auto => appliance_cache().ok().map(|cache| cache.join("warm")),
            WarmStart::Off => None,
        },
        ..defaults
    }
}

/// Where the memory of an appliance is kept that ended by itself, unless `TRANSHIP_DUMPS=off`.
fn dumps() -> Option<PathBuf> {
    if std::env::var_os("TRANSHIP_DUMPS").is_some_and(|value| value == "off") {
        return None;
    }
    appliance_cache().ok().map(|cache| cache.join("dumps"))
}

/// The program that the machine runs in: this very file.
pub(crate) fn monitor() -> Option<PathBuf> {
    std::env::current_exe().ok()
}

/// What libguestfs's list of settings, separated by colons, says about the backend.
fn from_libguestfs(settings: &str) -> Option<Preference> {
    settings.split(':').find_map(|setting| match setting {
        "force_tcg" => Some(Preference::Tcg),
        "force_kvm" => Some(Preference::Kvm),
        _ => None,
    })
}

/// The appliance's files, built first if need be.
pub(crate) fn boot(progress: &dyn Fn(Event)) -> Result<Boot, Failure> {
    let image = tranship_appliance_image::build(&build_options(None)?, progress)?;
    Ok(boot_files(image))
}

/// The files to boot from.
pub(crate) fn boot_files(image: Appliance) -> Boot {
    Boot { kernel: image.kernel, initramfs: image.initramfs, tools: image.tools }
}

/// A step of the appliance's build, in words.
pub(crate) fn build_step(event: &Event) -> Option<String> {
    match event {
        Event::Waiting => Some("waiting for another process that builds the appliance".to_owned()),
        Event::Downloading { package } => Some(format!("downloading {package}")),
        Event::Extracting { package } => Some(format!("unpacking {package}")),
        Event::Packing { what } => Some(format!("packing {what}")),
        Event::UsingImported { because } => {
            Some(format!("using the imported appliance, since there is no package: {because}"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(variables: &[(&str, &str)]) -> Option<String> {
        let find = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
        };
        cache_folder(find).map(|path| path.display().to_string())
    }

    #[test]
    fn the_most_special_variable_wins() {
        let all = [("TRANSHIP_CACHE", "/c"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(folder(&all).as_deref(), Some("/c"));
        assert_eq!(folder(&all[1..]).as_deref(), Some("/x/tranship"));
        assert_eq!(folder(&all[2..]).as_deref(), Some("/h/.cache/tranship"));
        assert_eq!(
            folder(&[("XDG_CACHE_HOME", "rel"), ("HOME", "/h")]).as_deref(),
            Some("/h/.cache/tranship")
        );
        assert_eq!(folder(&[]), None);
    }

    #[test]
    fn libguestfs_settings_choose_the_backend() {
        assert_eq!(from_libguestfs("network_bridge=x:force_tcg"), Some(Preference::Tcg));
        assert_eq!(from_libguestfs("force_kvm"), Some(Preference::Kvm));
        assert_eq!(from_libguestfs("gdb"), None);
    }
}
