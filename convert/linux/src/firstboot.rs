// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Work that only the running guest can do: packages. Done once, after the first start,
//! without holding it up.

use crate::draft::{Draft, PLAIN};
use crate::machine::{AgentPackage, Firmware, MachineFacts, Options};
use tranship_inspect::{AgentState, Facts, Init, Ownership, Result};
use tranship_protocol::GuestPath;

const DIRECTORY: &str = "/usr/local/lib/tranship";
const SCRIPT: &str = "/usr/local/lib/tranship/firstboot";
const UNIT: &str = "/etc/systemd/system/tranship-firstboot.service";
const WANTED_BY: &str = "/etc/systemd/system/multi-user.target.wants/tranship-firstboot.service";
const INIT_SCRIPT: &str = "/etc/init.d/tranship-firstboot";
/// Is there once the work is done, so that another conversion does not ask for it again.
const DONE: &str = "/var/lib/tranship/firstboot.done";
const PROGRAM: Ownership = Ownership { mode: 0o755, uid: 0, gid: 0 };

/// What the first start has to do.
struct Work<'a> {
    remove: Vec<&'a str>,
    install_agent: bool,
    packages: &'a [AgentPackage],
    /// Disk that grub-pc is asked to install itself to when it is updated.
    grub_disk: Option<String>,
}

/// Plans the script and what starts it, if there is anything to do.
pub(crate) fn plan(
    draft: &mut Draft<'_>,
    facts: &Facts,
    machine: &MachineFacts,
    options: &Options,
) -> Result<()> {
    if draft.tree.lstat(&GuestPath::of(DONE))?.is_some() {
        return Ok(());
    }
    let tools = facts.tools.iter().filter(|_| options.remove_tools);
    let grub_disk = machine
        .disks
        .first()
        .filter(|disk| disk.source_name != disk.target_name)
        .filter(|_| machine.firmware == Firmware::Bios && facts.packages.find("grub-pc").is_some())
        .map(|disk| format!("/dev/{}", disk.target_name));
    let work = Work {
        remove: tools
            .flat_map(|tool| &tool.packages)
            .map(String::as_str)
            .filter(is_plain)
            .collect(),
        install_agent: options.install_agent && facts.agent == AgentState::Absent,
        packages: &options.agent_packages,
        grub_disk,
    };
    if work.remove.is_empty() && !work.install_agent && work.grub_disk.is_none() {
        return Ok(());
    }
    let why = why(&work);
    if work.install_agent {
        for package in work.packages.iter().filter(|package| is_plain(&package.name.as_str())) {
            let path = GuestPath::of(DIRECTORY).join("packages").join(&package.name);
            draft.write(
                &path,
                package.content.clone(),
                PLAIN,
                "installs the guest agent without a network",
            )?;
        }
    }
    draft.write(&GuestPath::of(SCRIPT), script(&work).into_bytes(), PROGRAM, &why)?;
    match facts.os.init {
        Init::Systemd { .. } => {
            let starts = "starts that script once, beside everything else";
            draft.write(&GuestPath::of(UNIT), unit().into_bytes(), PLAIN, starts)?;
            draft.symlink(WANTED_BY, UNIT, starts)
        }
        Init::SysV => {
            let starts = "starts that script once, in the background";
            draft.write(
                &GuestPath::of(INIT_SCRIPT),
                init_script().into_bytes(),
                PROGRAM,
                starts,
            )?;
            for level in 2..=5 {
                let link = format!("/etc/rc{level}.d/S99tranship-firstboot");
                draft.symlink(&link, "../init.d/tranship-firstboot", starts)?;
            }
            Ok(())
        }
        Init::OpenRc | Init::Unknown => {
            let what = format!("nothing starts {SCRIPT} at the first start: run it by hand");
            draft.warn("no-first-start", what);
            Ok(())
        }
    }
}

/// Names that can stand in a shell script as they are.
fn is_plain(name: &&str) -> bool {
    let plain =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '+' | '_' | ':' | '~');
    name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain)
}

fn why(work: &Work<'_>) -> String {
    let mut parts = Vec::new();
    if !work.remove.is_empty() {
        parts.push(format!("removes {}", work.remove.join(", ")));
    }
    if work.install_agent {
        parts.push("installs qemu-guest-agent".to_owned());
    }
    if let Some(disk) = &work.grub_disk {
        parts.push(format!("tells grub-pc that its disk is {disk}"));
    }
    format!("{} at the first start", parts.join(", "))
}

fn script(work: &Work<'_>) -> String {
    let mut text = vec![String::from(
        "#!/bin/sh\n\
         # Finishes the move of this machine to KVM: runs once, then removes itself.\n\
         # What it did is in /var/log/tranship-firstboot.log.\n\
         set -u\n\
         exec >>/var/log/tranship-firstboot.log 2>&1\n\
         export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
         date\n\
         \n\
         # limited SECONDS COMMAND...: nothing here may hang for ever.\n\
         limited() {\n\
         \tseconds=$1\n\
         \tshift\n\
         \techo \"+ $*\"\n\
         \tif command -v timeout >/dev/null; then\n\
         \t\ttimeout \"$seconds\" \"$@\"\n\
         \telse\n\
         \t\t\"$@\"\n\
         \tfi || echo \"failed with status $?\"\n\
         }\n\
         options='-y -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold'\n",
    )];
    if let Some(disk) = &work.grub_disk {
        text.push(format!(
            "\n# Updates of GRUB would ask where it belongs: the old name of the disk is gone.\n\
             if command -v debconf-set-selections >/dev/null; then\n\
             \techo 'grub-pc grub-pc/install_devices multiselect {disk}' | debconf-set-selections\n\
             fi\n"
        ));
    }
    if !work.remove.is_empty() {
        text.push(format!("\nlimited 600 apt-get $options remove {}\n", work.remove.join(" ")));
    }
    if work.install_agent {
        text.push(format!(
            "\nhas_route() {{\n\
             \twhile read -r _ destination _; do\n\
             \t\t[ \"$destination\" = 00000000 ] && return 0\n\
             \tdone </proc/net/route\n\
             \treturn 1\n\
             }}\n\
             packages={DIRECTORY}/packages\n\
             if ls $packages/*.deb >/dev/null 2>&1; then\n\
             \tlimited 300 dpkg --install $packages/*.deb\n\
             else\n\
             \t# Wait for a default route, but not for long.\n\
             \ttries=60\n\
             \tuntil has_route || [ $tries -eq 0 ]; do\n\
             \t\ttries=$((tries - 1))\n\
             \t\tsleep 2\n\
             \tdone\n\
             \tlimited 300 apt-get update\n\
             \tlimited 600 apt-get $options --no-install-recommends install qemu-guest-agent\n\
             fi\n\
             if [ -d /run/systemd/system ]; then\n\
             \tlimited 60 systemctl --no-block start qemu-guest-agent.service\n\
             fi\n"
        ));
    }
    text.push(format!(
        "\nmkdir -p /var/lib/tranship\n\
         date >{DONE}\n\
         rm -f {WANTED_BY} {UNIT}\n\
         rm -f {INIT_SCRIPT} /etc/rc[2-5].d/S99tranship-firstboot\n\
         rm -rf {DIRECTORY}\n"
    ));
    text.concat()
}

/// `Type=simple` and no ordering after the network: the boot waits for nothing here.
fn unit() -> String {
    format!(
        "# Finishes the move of this machine to KVM; removes itself afterwards.\n\
         [Unit]\n\
         Description=Finish the move to KVM\n\
         ConditionPathExists={SCRIPT}\n\
         \n\
         [Service]\n\
         Type=simple\n\
         ExecStart=/bin/sh {SCRIPT}\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n"
    )
}

fn init_script() -> String {
    format!(
        "#!/bin/sh\n\
         ### BEGIN INIT INFO\n\
         # Provides: tranship-firstboot\n\
         # Required-Start: $local_fs\n\
         # Required-Stop:\n\
         # Default-Start: 2 3 4 5\n\
         # Default-Stop:\n\
         # Short-Description: Finish the move to KVM\n\
         ### END INIT INFO\n\
         [ \"$1\" = start ] && [ -f {SCRIPT} ] && /bin/sh {SCRIPT} &\n\
         exit 0\n"
    )
}
