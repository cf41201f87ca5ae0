// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the options of a copy mean, checked before anything is opened.

use crate::args::CopyArgs;
use crate::failure::Failure;
use crate::image::{secrets, sizes};
use std::time::Duration;
use tranship_block::CopyOptions;
use tranship_formats::Secrets;

/// Bytes of a chunk of a hash manifest.
pub(super) const HASH_CHUNK: u64 = 1 << 20;

/// What nbdcopy takes as the size of a request.
const SHORTEST_REQUEST: u64 = 4096;
const LONGEST_REQUEST: u64 = 32 << 20;

/// Requests to a server that are in flight by default: enough for a fast network.
const IN_FLIGHT: usize = 32;

/// Requests of them that write: each has a buffer, and all should stay in the processor's
/// cache.
const WRITES: usize = 16;

/// Connections by default, unless there are fewer processors.
const CONNECTIONS: usize = 4;

/// Most requests in flight; one that writes has a thread of its own.
const MOST_IN_FLIGHT: usize = 256;

/// A copy as it was asked for.
#[derive(Clone, Debug)]
pub(super) struct How {
    /// Connections to each server.
    pub(super) connections: usize,
    /// How long a server that is gone is tried again.
    pub(super) retry: Duration,
    /// What options of disks refer to.
    pub(super) secrets: Secrets,
    requests: Option<usize>,
    threads: Option<usize>,
    request_size: Option<u64>,
    queue_size: Option<u64>,
    /// Blocks of zeroes that become holes, if that was given.
    sparse: Option<u64>,
    synchronous: bool,
}

/// What decides how the bytes move.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Clone, Copy, Debug)]
pub(super) struct Sides {
    /// The connections of the side that has fewer, if one of them is a server.
    pub(super) connections: Option<usize>,
    /// The source is a server.
    pub(super) from_server: bool,
    /// The destination is a server, which takes many requests at a time.
    pub(super) to_server: bool,
    /// The destination takes bytes in ascending order alone.
    pub(super) ordered: bool,
    /// Nobody looks at the bytes that are written.
    pub(super) nowhere: bool,
}

impl How {
    pub(super) fn new(args: &CopyArgs) -> Result<Self, Failure> {
        let sparse = args.sparse.as_deref().map(sparse).transpose()?;
        let request_size = args.request_size.as_deref().map(request_size).transpose()?;
        let connections = args.connections.as_deref().map(|text| count("connections", text));
        let connections = connections.transpose()?.map(|count| count.max(1));
        let requests = args.requests.as_deref().map(|text| count("requests", text)).transpose()?;
        let threads = args.threads.as_deref().map(threads).transpose()?.flatten();
        let queue_size =
            args.queue_size.as_deref().map(|text| bytes("queue-size", text)).transpose()?;
        Ok(Self {
            connections: if args.synchronous {
                1
            } else {
                connections.unwrap_or_else(usual_connections)
            },
            retry: args.retry.unwrap_or_default(),
            secrets: secrets::parse(&args.object)?,
            requests,
            threads,
            request_size,
            queue_size,
            sparse,
            synchronous: args.synchronous,
        })
    }

    /// Bytes of a request.
    fn request(&self, sides: Sides) -> u64 {
        let usual = if sides.connections.is_some() { 256 << 10 } else { 1 << 20 };
        self.request_size.unwrap_or(usual)
    }

    /// Pieces that are copied at the same time.
    pub(super) fn in_flight(&self, sides: Sides) -> usize {
        if self.synchronous {
            return 1;
        }
        let Some(connections) = sides.connections else {
            return self.threads.unwrap_or(CopyOptions::default().threads).min(MOST_IN_FLIGHT);
        };
        let queue = self.queue_size.unwrap_or(16 << 20) / self.request(sides).max(1);
        let queued = usize::try_from(queue).unwrap_or(usize::MAX).max(1);
        let all = connections.max(1).saturating_mul(self.requests.unwrap_or(64).min(queued));
        let asked = self.requests.is_some() || self.queue_size.is_some();
        let most = match self.threads {
            Some(threads) if !sides.from_server => threads,
            _ if asked => MOST_IN_FLIGHT,
            _ if sides.to_server && !sides.from_server => WRITES,
            _ => IN_FLIGHT,
        };
        all.min(most).clamp(1, MOST_IN_FLIGHT)
    }

    /// Threads that work on what has come from a source with more requests in flight.
    fn workers(&self, sides: Sides) -> usize {
        let most = self.in_flight(sides);
        let asked = self.threads.or(self.requests.map(|_| MOST_IN_FLIGHT));
        match sides {
            Sides { connections: None, .. } => most,
            Sides { to_server: true, .. } => asked.unwrap_or(WRITES).min(most),
            Sides { nowhere: true, .. } => self.threads.unwrap_or(1).min(most),
            _ => self.threads.unwrap_or(CopyOptions::default().threads).min(most),
        }
    }

    /// The copy engine's part.
    pub(super) fn options(&self, args: &CopyArgs, sides: Sides) -> CopyOptions {
        let request = self.request(sides);
        let usual = CopyOptions::default();
        // Where all bytes have to be written one by one, looking for zeroes gains nothing.
        let looks = self.sparse.unwrap_or(if sides.ordered || sides.nowhere { 0 } else { 4096 });
        CopyOptions {
            threads: self.workers(sides),
            in_flight: if sides.connections.is_some() { self.in_flight(sides) } else { 0 },
            chunk: request,
            // A file is read in steps that stay in the processor's cache, and written whole.
            step: if self.request_size.is_some() || sides.connections.is_some() {
                request
            } else {
                usual.step
            },
            extents: !args.no_extents,
            zero_block: looks,
            allocate: args.allocated && !sides.ordered,
            ordered: self.synchronous || sides.ordered,
            hash: args.hash.as_ref().map(|_| HASH_CHUNK),
            ..usual
        }
    }
}

/// More connections than processors only wait for each other.
fn usual_connections() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(CONNECTIONS)
}

fn could_not_parse(option: &str, text: &str) -> Failure {
    Failure::usage(format!("--{option}: could not parse: {text}"))
}

fn bytes(option: &str, text: &str) -> Result<u64, Failure> {
    sizes::parse(text).map_err(|_| could_not_parse(option, text))
}

fn count(option: &str, text: &str) -> Result<usize, Failure> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(could_not_parse(option, text)),
    }
}

/// `None` finds a good number.
fn threads(text: &str) -> Result<Option<usize>, Failure> {
    let count: usize = text.parse().map_err(|_| could_not_parse("threads", text))?;
    Ok((count > 0).then_some(count))
}

fn request_size(text: &str) -> Result<u64, Failure> {
    let size = bytes("request-size", text)?;
    if size.is_power_of_two() && (SHORTEST_REQUEST..=LONGEST_REQUEST).contains(&size) {
        return Ok(size);
    }
    Err(Failure::usage(format!(
        "--request-size: must be a power of 2 within {SHORTEST_REQUEST}-{LONGEST_REQUEST}"
    )))
}

fn sparse(text: &str) -> Result<u64, Failure> {
    match bytes("sparse", text)? {
        0 => Ok(0),
        size if size.is_power_of_two() && size >= 512 => Ok(size),
        _ => Err(Failure::usage("--sparse: must be a power of 2 and >= 512")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, Parsed, parse};
    use crate::personality::Personality;
    use std::ffi::OsString;

    fn args(words: &str) -> CopyArgs {
        let words = format!("nbdcopy {words} a b");
        let words = words.split_whitespace().map(OsString::from).collect();
        match parse(Personality::NbdCopy, words).unwrap() {
            Parsed::Command(Command::Copy(args)) => *args,
            other => panic!("{other:?}"),
        }
    }

    const FILES: Sides = Sides {
        connections: None,
        from_server: false,
        to_server: false,
        ordered: false,
        nowhere: false,
    };

    #[test]
    fn mistakes_are_told_as_nbdcopy_tells_them() {
        for (words, expected) in [
            ("--request-size=5000", "--request-size: must be a power of 2 within 4096-33554432"),
            ("--request-size=64M", "--request-size: must be a power of 2 within 4096-33554432"),
            ("--request-size=x", "--request-size: could not parse: x"),
            ("-C 0", "--connections: could not parse: 0"),
            ("-R x", "--requests: could not parse: x"),
            ("-T x", "--threads: could not parse: x"),
            ("-S 100", "--sparse: must be a power of 2 and >= 512"),
            ("-S 1000", "--sparse: must be a power of 2 and >= 512"),
        ] {
            assert_eq!(How::new(&args(words)).unwrap_err().message(), expected, "{words}");
        }
    }

    #[test]
    fn what_is_in_flight_is_bounded_by_everything() {
        let to = |count| Sides { connections: Some(count), to_server: true, ..FILES };
        let from = |count| Sides { connections: Some(count), from_server: true, ..FILES };
        let both = Sides { to_server: true, ..from(2) };
        let nowhere = Sides { nowhere: true, ..from(2) };
        let local = CopyOptions::default().threads;
        for (words, sides, requests, workers) in [
            ("", to(4), 16, 16),
            ("-C 1", to(1), 16, 16),
            ("", from(1), 32, local),
            ("", both, 32, 16),
            ("", nowhere, 32, 1),
            ("-R 1", to(4), 4, 4),
            ("-R 64", to(1), 64, 64),
            ("-R 64", from(1), 64, local),
            ("-R 64", both, 128, 128),
            ("-C 8 -R 64", to(8), 256, 256),
            ("-T 3", to(4), 3, 3),
            ("-T 3", from(1), 32, 3),
            ("--queue-size 1M", to(1), 4, 4),
            ("--queue-size 1", from(1), 1, 1),
            ("--request-size 1M --queue-size 4M", to(2), 8, 8),
            ("--synchronous", from(1), 1, 1),
            ("-T 3", FILES, 3, 3),
        ] {
            let how = How::new(&args(words)).unwrap();
            let found = (how.in_flight(sides), how.workers(sides));
            assert_eq!(found, (requests, workers), "{words} {sides:?}");
        }
    }

    #[test]
    fn zeroes_are_looked_for_where_they_make_holes() {
        let looks = |words: &str, sides| {
            let args = args(words);
            How::new(&args).unwrap().options(&args, sides).zero_block
        };
        assert_eq!(looks("", FILES), 4096);
        assert_eq!(looks("-S 0", FILES), 0);
        assert_eq!(looks("-S 64k", FILES), 65_536);
        assert_eq!(looks("", Sides { ordered: true, ..FILES }), 0);
        assert_eq!(looks("", Sides { nowhere: true, ..FILES }), 0);
    }
}
