// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of `serve`, which are qemu-nbd's with more of our own, also by that name.
//!
//! Values stay text here, so that both names of the program report a wrong one in
//! qemu-nbd's words.

use super::image::getopt;
use super::{Command, Parsed};
use crate::failure::Failure;
use crate::personality::Personality;
use clap::error::ErrorKind as ClapKind;
use clap::{Args, FromArgMatches};
use std::ffi::OsString;
use std::path::PathBuf;

const LISTENING: &str = "Where clients connect";
const PART: &str = "What clients see";
const OPENING: &str = "How disks are opened";
const RUNNING: &str = "Running";

/// Options of `serve`.
#[allow(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
#[derive(Debug, Default, Args)]
pub(crate) struct ServeArgs {
    /// Unix socket to listen on; it has to be an absolute path
    #[arg(short = 'k', long, value_name = "PATH", help_heading = LISTENING)]
    pub(crate) socket: Option<PathBuf>,
    /// The same, also relative; - makes a socket in a folder of its own, for --run
    #[arg(short = 'U', long = "unix", value_name = "PATH", help_heading = LISTENING)]
    pub(crate) unix: Option<PathBuf>,
    /// TCP port to listen on (10809 without any place); 0 takes a free one and prints it
    #[arg(short, long, value_name = "PORT", allow_hyphen_values = true, help_heading = LISTENING)]
    pub(crate) port: Option<String>,
    /// Address to listen on (default 127.0.0.1; as qemu-nbd, all addresses)
    #[arg(short, long, value_name = "ADDRESS", help_heading = LISTENING)]
    pub(crate) bind: Option<String>,
    /// Listen on VM sockets, at the port that -p gives
    #[arg(long, help_heading = LISTENING)]
    pub(crate) vsock: bool,
    /// Clients at the same time (default 1); 0 is any number
    #[arg(short = 'e', long, value_name = "NUM", allow_hyphen_values = true,
          help_heading = LISTENING)]
    pub(crate) shared: Option<String>,
    /// Seconds that a client's handshake may take (default 10); 0 is any time
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = LISTENING)]
    pub(crate) handshake_limit: Option<String>,
    /// Encrypt with the credentials that this object has; clients have to
    #[arg(long, value_name = "ID", help_heading = LISTENING)]
    pub(crate) tls_creds: Option<String>,
    /// Let those clients in that this object allows, by the names in their certificates
    #[arg(long, value_name = "ID", help_heading = LISTENING)]
    pub(crate) tls_authz: Option<String>,
    /// Name that a server's certificate has to have, with -L
    #[arg(long, value_name = "HOSTNAME", help_heading = LISTENING)]
    pub(crate) tls_hostname: Option<String>,
    /// Whether clients encrypt: off, on (if they want to), require (default with
    /// certificates)
    #[arg(long, value_name = "MODE", help_heading = LISTENING)]
    pub(crate) tls: Option<String>,
    /// Encrypt with server-cert.pem and server-key.pem of this folder
    #[arg(long, value_name = "DIR", help_heading = LISTENING)]
    pub(crate) tls_certificates: Option<PathBuf>,
    /// Clients have to have a certificate that ca-cert.pem of the same folder vouches for
    #[arg(long, help_heading = LISTENING)]
    pub(crate) tls_verify_peer: bool,

    /// Name of the export (default: the empty name)
    #[arg(short = 'x', long, value_name = "NAME", allow_hyphen_values = true,
          help_heading = PART)]
    pub(crate) export_name: Option<String>,
    /// What clients are told about the export
    #[arg(short = 'D', long, value_name = "TEXT", allow_hyphen_values = true,
          help_heading = PART)]
    pub(crate) description: Option<String>,
    /// Clients cannot write
    #[arg(short, long, help_heading = PART)]
    pub(crate) read_only: bool,
    /// What clients write goes to a temporary file and is thrown away
    #[arg(short, long, help_heading = PART)]
    pub(crate) snapshot: bool,
    /// Serve a snapshot in the image, read-only: its name or id, or snapshot.id=ID, or
    /// snapshot.name=NAME
    #[arg(short, long, value_name = "SNAPSHOT", allow_hyphen_values = true, help_heading = PART)]
    pub(crate) load_snapshot: Option<String>,
    /// Begin at this byte of the disk
    #[arg(short, long, value_name = "OFFSET", allow_hyphen_values = true, help_heading = PART)]
    pub(crate) offset: Option<String>,
    /// Serve a bitmap of the image as a metadata context. Can be repeated
    #[arg(short = 'B', long, value_name = "NAME", help_heading = PART)]
    pub(crate) bitmap: Vec<String>,
    /// Tell which image of the chain has what, as a metadata context
    #[arg(short = 'A', long, help_heading = PART)]
    pub(crate) allocation_depth: bool,

    /// Format of the disks; without it they are looked at
    #[arg(short, long, value_name = "FORMAT", allow_hyphen_values = true, help_heading = OPENING)]
    pub(crate) format: Option<String>,
    /// Take DISK for options such as driver=qcow2,file.filename=NAME
    #[arg(long, help_heading = OPENING)]
    pub(crate) image_opts: bool,
    /// What options refer to: secret,id=ID,data=TEXT or secret,id=ID,file=FILE,
    /// tls-creds-x509,id=ID,endpoint=server,dir=DIR, authz-simple,id=ID,identity=NAME. Can
    /// be repeated
    #[arg(long, value_name = "OBJDEF", allow_hyphen_values = true, help_heading = OPENING)]
    pub(crate) object: Vec<String>,
    /// Let images open what lies below this folder, or be based on the export with this URI.
    /// Without it an image gets nothing but files of its own folder. Can be repeated
    #[arg(long, value_name = "DIR|URI", help_heading = OPENING)]
    pub(crate) allow_path: Vec<PathBuf>,
    /// Serve what is there of a damaged image, and zeroes for the rest; with -r or -s
    #[arg(long, help_heading = OPENING)]
    pub(crate) salvage: bool,
    /// Go past the page cache: the same as --cache=none
    #[arg(short = 'n', long, help_heading = OPENING)]
    pub(crate) nocache: bool,
    /// How disks are cached: none, writeback (default), writethrough, directsync, unsafe
    #[arg(long, value_name = "MODE", help_heading = OPENING)]
    pub(crate) cache: Vec<String>,
    /// How disks are read: threads (default), native, io_uring; threads do it in any case
    #[arg(long, value_name = "MODE", help_heading = OPENING)]
    pub(crate) aio: Vec<String>,
    /// What is done with space that clients give back: ignore (default), unmap
    #[arg(long, value_name = "MODE", help_heading = OPENING)]
    pub(crate) discard: Vec<String>,
    /// What is done with zeroes that clients write: off (default), on, unmap
    #[arg(long, value_name = "MODE", help_heading = OPENING)]
    pub(crate) detect_zeroes: Option<String>,
    /// Read and write each disk at no more than this many bytes a second, such as 50M
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, help_heading = OPENING)]
    pub(crate) limit_rate: Option<String>,
    /// Do no more than this many operations a second with each disk
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = OPENING)]
    pub(crate) limit_iops: Option<String>,

    /// Stay when the last client has left
    #[arg(short = 't', long, help_heading = RUNNING)]
    pub(crate) persistent: bool,
    /// Run this shell command, and end with it. It has the variables uri, nbd, unixsocket,
    /// port and exportname
    #[arg(long, value_name = "COMMAND", allow_hyphen_values = true, help_heading = RUNNING)]
    pub(crate) run: Option<String>,
    /// Go on in the background as soon as clients can connect
    #[arg(long, help_heading = RUNNING)]
    pub(crate) fork: bool,
    /// Write the number of the process to this file
    #[arg(long, value_name = "PATH", help_heading = RUNNING)]
    pub(crate) pid_file: Option<PathBuf>,
    /// At the end, write what clients did to this file, as JSON; to standard error if it
    /// is -. The signal SIGUSR1 does it at once
    #[arg(long, value_name = "FILE", allow_hyphen_values = true, help_heading = RUNNING)]
    pub(crate) statistics: Option<PathBuf>,
    /// Say what is done
    #[arg(short, long, help_heading = RUNNING)]
    pub(crate) verbose: bool,
    /// List what another server offers, instead of serving
    #[arg(short = 'L', long, help_heading = RUNNING)]
    pub(crate) list: bool,
    /// A device of the kernel's client; there is nothing here that works with it
    #[arg(short = 'c', long, value_name = "DEV", hide = true)]
    pub(crate) connect: Option<OsString>,
    /// The same
    #[arg(short = 'd', long, value_name = "DEV", hide = true)]
    pub(crate) disconnect: Option<OsString>,

    /// The disk, or several as NAME=DISK, each an export of this name
    #[arg(value_name = "DISK")]
    pub(crate) disks: Vec<OsString>,
}

/// Gives the command what its options have in common.
pub(super) fn describe(definition: clap::Command) -> clap::Command {
    definition.infer_long_args(true).args_override_self(true)
}

/// The definition for the name `qemu-nbd`.
fn as_qemu_nbd(name: &'static str) -> clap::Command {
    super::link(describe(ServeArgs::augment_args(super::named(name)))).version(concat!(
        "10.0.2 (tranship ",
        env!("CARGO_PKG_VERSION"),
        ")"
    ))
}

/// Parses what follows the name `qemu-nbd`.
pub(super) fn parse(rest: &[OsString]) -> Result<Parsed, Failure> {
    let name = Personality::QemuNbd.program();
    let words = std::iter::once(OsString::from(name)).chain(rest.iter().cloned());
    let args = as_qemu_nbd(name)
        .try_get_matches_from(words)
        .and_then(|matches| ServeArgs::from_arg_matches(&matches));
    match args {
        Ok(args) => Ok(Parsed::Command(Command::Serve(Box::new(args)))),
        Err(error) => match error.kind() {
            ClapKind::DisplayHelp | ClapKind::DisplayVersion => {
                Ok(Parsed::Text(error.render().to_string()))
            }
            _ => Err(Failure::usage(getopt::message(rest, &error))
                .hint(format!("Try `{name} --help' for more information."))
                .exiting_with(1)),
        },
    }
}

#[cfg(test)]
mod tests {
    use crate::args::{Command, Parsed, parse};
    use crate::personality::Personality;
    use std::ffi::OsString;

    fn parsed(words: &[&str]) -> Result<Parsed, crate::failure::Failure> {
        let words = std::iter::once("qemu-nbd").chain(words.iter().copied()).map(OsString::from);
        parse(Personality::QemuNbd, words.collect())
    }

    #[test]
    fn short_and_shortened_options_are_understood() {
        let Ok(Parsed::Command(Command::Serve(args))) =
            parsed(&["-rtk", "/s", "-e2", "--export=vda", "--desc", "text", "-f", "raw", "d.img"])
        else {
            panic!("this is a command line of qemu-nbd");
        };
        assert!(args.read_only && args.persistent);
        assert_eq!(args.shared.as_deref(), Some("2"));
        assert_eq!(args.export_name.as_deref(), Some("vda"));
        assert_eq!(args.description.as_deref(), Some("text"));
        assert_eq!(args.disks, ["d.img"]);
    }

    #[test]
    fn mistakes_are_reported_as_getopt_does() {
        for (words, expected) in [
            (&["--nope", "d.img"][..], "qemu-nbd: unrecognized option '--nope'\n"),
            (&["d.img", "-Z"], "qemu-nbd: invalid option -- 'Z'\n"),
            (&["d.img", "-k"], "qemu-nbd: option requires an argument -- 'k'\n"),
            (&["d.img", "--socket"], "qemu-nbd: option '--socket' requires an argument\n"),
        ] {
            let failure = parsed(words).unwrap_err();
            let text = failure.render_for(Personality::QemuNbd);
            assert_eq!(text, format!("{expected}Try `qemu-nbd --help' for more information.\n"));
            assert_eq!(failure.exit_code(), 1);
        }
    }
}
