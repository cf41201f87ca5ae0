// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the options of `serve` mean, checked before anything is opened.

use super::policy::{DetectZeroes, Durability, Policy};
use crate::args::ServeArgs;
use crate::failure::Failure;
use crate::image::sizes;
use crate::personality::Personality;
use std::ffi::{OsStr, OsString};
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;
use tranship_block::Rate;

/// The port of NBD.
pub(super) const PORT: u16 = 10_809;

/// Longest name and description that the protocol has.
const LONGEST_TEXT: usize = 4096;

/// As good as no limit, and still a moment that clocks can have.
const FOREVER: Duration = Duration::from_hours(24 * 365);

/// Where clients are to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// At a socket in a folder of this run's own.
    Private,
    /// At this Unix socket.
    Unix(PathBuf),
    /// At this host's addresses.
    Tcp { host: String, port: u16 },
    /// From virtual machines and their host.
    Vsock { port: u32 },
}

/// A disk, and the name under which clients find it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) export: String,
    pub(super) disk: OsString,
}

/// What the options mean.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) places: Vec<Wanted>,
    /// Clients at the same time; any number if there is none.
    pub(super) clients: Option<usize>,
    pub(super) handshake: Duration,
    pub(super) disks: Vec<Named>,
    pub(super) offset: u64,
    /// Tell which image of the chain has what.
    pub(super) depth: bool,
    /// Go past the page cache.
    pub(super) direct: bool,
    pub(super) policy: Policy,
    pub(super) rate: Option<Rate>,
}

impl Settings {
    /// Checks the options; `is_activated` says that somebody has opened the sockets already.
    pub(super) fn of(
        args: &ServeArgs,
        personality: Personality,
        is_activated: bool,
    ) -> Result<Self, Failure> {
        refuse_absent(args)?;
        let (direct, durability) = caching(args)?;
        let discards = discards(args)?;
        let zeroes = zeroes(args, discards)?;
        asynchronous(args, direct)?;
        if args.image_opts && args.format.is_some() {
            return Err(Failure::usage("--image-opts and -f are mutually exclusive"));
        }
        let read_only = args.read_only || args.load_snapshot.is_some();
        if args.salvage && !read_only && !args.snapshot {
            return Err(Failure::usage("--salvage makes up what is missing, which -r or -s keep")
                .hint("add -r, or -s to let clients write to a temporary file"));
        }
        Ok(Self {
            places: places(args, personality, is_activated)?,
            clients: clients(args.shared.as_deref())?,
            handshake: handshake(args.handshake_limit.as_deref())?,
            disks: disks(args, personality)?,
            offset: offset(args.offset.as_deref())?,
            depth: args.allocation_depth,
            direct,
            policy: Policy { discards, zeroes, durability },
            rate: rate(args)?,
        })
    }
}

/// Known options of qemu-nbd that have nothing behind them.
fn refuse_absent(args: &ServeArgs) -> Result<(), Failure> {
    if args.connect.is_some() || args.disconnect.is_some() {
        return Err(Failure::usage("there is no client of the kernel's here (-c, -d)")
            .hint("programs that speak NBD need none; for the others there is nbd-client"));
    }
    Ok(())
}

/// A mode that may be given once.
fn only<'a>(values: &'a [String], message: &str) -> Result<Option<&'a str>, Failure> {
    match values {
        [] => Ok(None),
        [value] => Ok(Some(value)),
        _ => Err(Failure::usage(message)),
    }
}

fn caching(args: &ServeArgs) -> Result<(bool, Durability), Failure> {
    const TWICE: &str = "-n and --cache can only be specified once";
    let given = only(&args.cache, TWICE)?;
    if args.nocache && given.is_some() {
        return Err(Failure::usage(TWICE));
    }
    match given.or(args.nocache.then_some("none")) {
        None | Some("writeback") => Ok((false, Durability::WhenFlushed)),
        Some("none" | "off") => Ok((true, Durability::WhenFlushed)),
        Some("writethrough") => Ok((false, Durability::Always)),
        Some("directsync") => Ok((true, Durability::Always)),
        Some("unsafe") => Ok((false, Durability::Never)),
        Some(other) => Err(Failure::usage(format!("Invalid cache mode `{other}'"))),
    }
}

/// Whether space is given back.
fn discards(args: &ServeArgs) -> Result<bool, Failure> {
    match only(&args.discard, "--discard can only be specified once")? {
        None | Some("ignore" | "off") => Ok(false),
        Some("unmap" | "on") => Ok(true),
        Some(other) => Err(Failure::usage(format!("Invalid discard mode `{other}'"))),
    }
}

fn zeroes(args: &ServeArgs, discards: bool) -> Result<DetectZeroes, Failure> {
    match args.detect_zeroes.as_deref() {
        None | Some("off") => Ok(DetectZeroes::Off),
        Some("on") => Ok(DetectZeroes::On),
        Some("unmap") if discards => Ok(DetectZeroes::Unmap),
        Some("unmap") => Err(Failure::usage(
            "setting detect-zeroes to unmap is not allowed without setting discard operation \
             to unmap",
        )),
        Some(other) => Err(Failure::usage(format!(
            "Failed to parse detect_zeroes mode: invalid parameter value: {other}"
        ))),
    }
}

/// There is one way to read files here; the names of QEMU's are checked and taken for it.
fn asynchronous(args: &ServeArgs, direct: bool) -> Result<(), Failure> {
    match only(&args.aio, "--aio can only be specified once")? {
        None | Some("threads" | "io_uring") => Ok(()),
        Some("native") if direct => Ok(()),
        Some("native") => Err(Failure::usage(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        )),
        Some(other) => Err(Failure::usage(format!("Invalid aio mode '{other}'"))),
    }
}

fn clients(text: Option<&str>) -> Result<Option<usize>, Failure> {
    let Some(text) = text else { return Ok(Some(1)) };
    match text.parse::<i32>().ok().and_then(|number| usize::try_from(number).ok()) {
        Some(0) => Ok(None),
        Some(number) => Ok(Some(number)),
        None => Err(Failure::usage(format!("Invalid shared device number '{text}'"))),
    }
}

fn handshake(text: Option<&str>) -> Result<Duration, Failure> {
    match text.map(str::parse::<u32>) {
        None => Ok(Duration::from_secs(10)),
        Some(Ok(0)) => Ok(FOREVER),
        Some(Ok(seconds)) => Ok(Duration::from_secs(seconds.into()).min(FOREVER)),
        Some(Err(_)) => {
            Err(Failure::usage(format!("Invalid handshake limit '{}'", text.unwrap_or_default())))
        }
    }
}

fn offset(text: Option<&str>) -> Result<u64, Failure> {
    let Some(text) = text else { return Ok(0) };
    let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| Failure::usage(format!("Invalid offset '{text}'")))
}

fn rate(args: &ServeArgs) -> Result<Option<Rate>, Failure> {
    let number = |text: Option<&str>, what: &str| -> Result<Option<NonZeroU64>, Failure> {
        let Some(text) = text else { return Ok(None) };
        match sizes::parse(text) {
            Ok(number) => Ok(NonZeroU64::new(number)),
            Err(_) => Err(Failure::usage(format!("Invalid rate limit specified: '{text}'."))
                .hint(format!("{what} takes a number such as 50M; 0 is no limit"))),
        }
    };
    let bytes = number(args.limit_rate.as_deref(), "--limit-rate")?;
    let operations = number(args.limit_iops.as_deref(), "--limit-iops")?;
    Ok((bytes.is_some() || operations.is_some()).then_some(Rate { bytes, operations }))
}

fn places(
    args: &ServeArgs,
    personality: Personality,
    is_activated: bool,
) -> Result<Vec<Wanted>, Failure> {
    let mut places = Vec::new();
    if let Some(path) = &args.socket {
        if path.is_relative() {
            return Err(Failure::usage("socket path must be absolute"));
        }
        places.push(Wanted::Unix(path.clone()));
    }
    match &args.unix {
        Some(path) if path.as_os_str() == "-" => {
            if args.run.is_none() {
                return Err(Failure::usage("-U - makes a socket that only --run can know")
                    .hint("name a path: -U PATH"));
            }
            places.push(Wanted::Private);
        }
        Some(path) => places.push(Wanted::Unix(path.clone())),
        None => {}
    }
    // As qemu-nbd has it, other places replace the port.
    let is_network = args.port.is_some() || args.bind.is_some() || args.vsock;
    if is_network || places.is_empty() && !is_activated {
        let port = port(args.port.as_deref())?;
        if args.vsock {
            if args.bind.is_some() {
                return Err(Failure::usage("--vsock has no address (-b)"));
            }
            places.push(Wanted::Vsock { port: port.into() });
        } else {
            // A disk without a password is not for everybody, but a link with that name is
            // there for callers that count on it.
            let all = if personality == Personality::QemuNbd { "0.0.0.0" } else { "127.0.0.1" };
            let host = args.bind.clone().unwrap_or_else(|| all.to_owned());
            places.push(Wanted::Tcp { host, port });
        }
    }
    if is_activated {
        let given = [
            (args.socket.is_some() || args.unix.is_some(), "Unix socket"),
            (args.bind.is_some(), "The interface"),
            (args.port.is_some() || args.vsock, "TCP port number"),
        ];
        if let Some((_, what)) = given.iter().find(|(is_given, _)| *is_given) {
            return Err(Failure::usage(format!(
                "{what} can't be set when using socket activation"
            )));
        }
    }
    Ok(places)
}

/// The number of a port.
pub(super) fn port(text: Option<&str>) -> Result<u16, Failure> {
    let Some(text) = text else { return Ok(PORT) };
    text.parse().map_err(|_| Failure::usage(format!("Invalid port '{text}', expected 0 to 65535")))
}

/// The disks under their names.
fn disks(args: &ServeArgs, personality: Personality) -> Result<Vec<Named>, Failure> {
    let default = args.export_name.clone().unwrap_or_default();
    if default.len() > LONGEST_TEXT {
        return Err(Failure::usage("export name is longer than 4096 bytes"));
    }
    if args.description.as_ref().is_some_and(|text| text.len() > LONGEST_TEXT) {
        return Err(Failure::usage("export description is longer than 4096 bytes"));
    }
    if personality == Personality::QemuNbd {
        return match args.disks.as_slice() {
            [disk] => Ok(vec![Named { export: default, disk: disk.clone() }]),
            _ => Err(Failure::usage("Invalid number of arguments")
                .hint("Try `qemu-nbd --help' for more information.")),
        };
    }
    let split = args.disks.iter().map(|word| (word, name_of(word, args.image_opts)));
    let split: Vec<_> = split.collect();
    match split.as_slice() {
        [] => Err(Failure::usage("no disk was given").hint("see `tranship serve --help`")),
        [(disk, None)] => Ok(vec![Named { export: default, disk: (*disk).clone() }]),
        _ if args.export_name.is_some() => {
            Err(Failure::usage("-x names one disk, and NAME=DISK names another"))
        }
        all => all
            .iter()
            .map(|(word, named)| {
                let (export, disk) = named.clone().ok_or_else(|| {
                    let word = word.display();
                    Failure::usage(format!("several disks need names, and {word} has none"))
                        .hint(format!("name each: NAME={word}"))
                })?;
                Ok(Named { export, disk })
            })
            .collect(),
    }
}

/// Splits `NAME=DISK`. What has a slash in front of the first `=` is a path, and of options
/// the first one has a `=` of its own: `NAME=driver=raw,…`.
fn name_of(word: &OsStr, are_options: bool) -> Option<(String, OsString)> {
    let bytes = word.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=')?;
    let (name, rest) = (bytes.get(..at)?, bytes.get(at + 1..)?);
    let name = std::str::from_utf8(name).ok()?;
    if name.contains(['/', ':', ',']) {
        return None;
    }
    let first = rest.split(|byte| *byte == b',').next().unwrap_or_default();
    if are_options && !first.contains(&b'=') {
        return None;
    }
    Some((name.to_owned(), OsStr::from_bytes(rest).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Change = fn(&mut ServeArgs);

    fn settings(change: impl FnOnce(&mut ServeArgs)) -> Result<Settings, Failure> {
        let mut args = ServeArgs { disks: vec!["d.img".into()], ..ServeArgs::default() };
        change(&mut args);
        Settings::of(&args, Personality::Tranship, false)
    }

    #[test]
    fn disks_have_names_if_there_are_several() {
        let names = |words: &[&str], options| {
            let disks = words.iter().map(OsString::from).collect();
            settings(|args| (args.disks, args.image_opts) = (disks, options)).map(|settings| {
                let shown = |named: Named| format!("{}|{}", named.export, named.disk.display());
                settings.disks.into_iter().map(shown).collect::<Vec<_>>()
            })
        };
        for (words, options, expected) in [
            (&["d.img"][..], false, &["|d.img"][..]),
            (&["a=d.img"], false, &["a|d.img"]),
            (&["=d.img"], false, &["|d.img"]),
            (&["./a=d.img"], false, &["|./a=d.img"]),
            (&["nbd://h/x?a=b"], false, &["|nbd://h/x?a=b"]),
            (&["a=d.img", "b=e=f"], false, &["a|d.img", "b|e=f"]),
            (&["driver=raw,x=y"], true, &["|driver=raw,x=y"]),
            (&["a=driver=raw,x=y"], true, &["a|driver=raw,x=y"]),
        ] {
            assert_eq!(names(words, options).unwrap(), expected, "{words:?}");
        }
        assert!(names(&["a=d", "e"], false).unwrap_err().message().contains("e has none"));
        assert!(names(&[], false).unwrap_err().message().contains("no disk"));
    }

    #[test]
    fn places_follow_the_options() {
        let tcp = |host: &str, port| Wanted::Tcp { host: host.to_owned(), port };
        let unix = |path: &str| Wanted::Unix(path.into());
        let cases: [(Change, Vec<Wanted>); 6] = [
            (|_| {}, vec![tcp("127.0.0.1", 10_809)]),
            (|args| args.socket = Some("/s".into()), vec![unix("/s")]),
            (|args| args.unix = Some("s".into()), vec![unix("s")]),
            (|args| args.port = Some("0".into()), vec![tcp("127.0.0.1", 0)]),
            (
                |args| {
                    args.socket = Some("/s".into());
                    args.bind = Some("::1".into());
                },
                vec![unix("/s"), tcp("::1", 10_809)],
            ),
            (
                |args| {
                    args.unix = Some("-".into());
                    args.run = Some("true".into());
                },
                vec![Wanted::Private],
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(settings(change).unwrap().places, expected);
        }
    }

    #[test]
    fn mistakes_are_told_in_qemu_nbds_words() {
        let cases: [(Change, &str); 13] = [
            (|args| args.socket = Some("s".into()), "socket path must be absolute"),
            (|args| args.shared = Some("-1".into()), "Invalid shared device number '-1'"),
            (|args| args.offset = Some("1M".into()), "Invalid offset '1M'"),
            (|args| args.port = Some("99999".into()), "Invalid port '99999', expected 0 to 65535"),
            (|args| args.cache = vec!["foo".into()], "Invalid cache mode `foo'"),
            (|args| args.aio = vec!["foo".into()], "Invalid aio mode 'foo'"),
            (|args| args.discard = vec!["foo".into()], "Invalid discard mode `foo'"),
            (
                |args| args.discard = vec!["unmap".into(), "unmap".into()],
                "--discard can only be specified once",
            ),
            (
                |args| (args.nocache, args.cache) = (true, vec!["none".into()]),
                "-n and --cache can only be specified once",
            ),
            (
                |args| args.detect_zeroes = Some("unmap".into()),
                "setting detect-zeroes to unmap is not allowed without setting discard \
                 operation to unmap",
            ),
            (
                |args| (args.image_opts, args.format) = (true, Some("raw".into())),
                "--image-opts and -f are mutually exclusive",
            ),
            (|args| args.unix = Some("-".into()), "-U - makes a socket that only --run can know"),
            (|args| args.salvage = true, "--salvage makes up what is missing, which -r or -s keep"),
        ];
        for (change, expected) in cases {
            assert_eq!(settings(change).unwrap_err().message(), expected);
        }
    }

    #[test]
    fn sockets_that_are_there_need_no_other_place() {
        let mut args = ServeArgs { disks: vec!["d".into()], ..ServeArgs::default() };
        let of = |args: &_| Settings::of(args, Personality::QemuNbd, true);
        assert_eq!(of(&args).unwrap().places, []);
        args.port = Some("1".into());
        let failure = of(&args).unwrap_err();
        assert_eq!(failure.message(), "TCP port number can't be set when using socket activation");
    }
}
